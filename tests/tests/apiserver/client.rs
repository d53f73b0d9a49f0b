//! What the agent's own client library sees of the double: the kube crate, as it is.

use std::{collections::BTreeMap, time::Duration};

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::{
    core::v1::{Node, ObjectReference, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{
        WatchStreamExt as _,
        events::{Event as Report, EventType, Recorder, Reporter},
        watcher::{self, Event, watcher},
    },
};
use proxier_tests::apiserver::{ApiServer, Fault, Kind, Resource, Verb};
use serde_json::json;

use super::{
    objects::{LABEL, server_with, service, slice, touch},
    wire::PATIENCE,
};

async fn client(server: &ApiServer) -> Client {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kubeconfig");
    server.write_kubeconfig(&path).unwrap();
    let kubeconfig = Kubeconfig::read_from(&path).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

fn run(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE * 3, work).await.unwrap() });
}

/// A view of the objects as a program has it that follows the watcher.
#[derive(Default)]
struct View {
    objects: BTreeMap<String, Service>,
    coming: BTreeMap<String, Service>,
    lists: usize,
}

impl View {
    fn take(&mut self, event: Event<Service>) {
        match event {
            Event::Init => self.coming.clear(),
            Event::InitApply(object) => drop(self.coming.insert(object.name_any(), object)),
            Event::InitDone => {
                self.objects = std::mem::take(&mut self.coming);
                self.lists += 1;
            }
            Event::Apply(object) => drop(self.objects.insert(object.name_any(), object)),
            Event::Delete(object) => drop(self.objects.remove(&object.name_any())),
        }
    }

    /// Follows until `done`; errors that the watcher gets over are its own.
    async fn until(
        &mut self,
        stream: &mut (impl Stream<Item = watcher::Result<Event<Service>>> + Unpin),
        done: impl Fn(&Self) -> bool,
    ) {
        while !done(self) {
            if let Ok(event) = stream.next().await.unwrap() {
                self.take(event);
            }
        }
    }

    fn names(&self) -> Vec<&str> {
        self.objects.keys().map(String::as_str).collect()
    }
}

#[test]
fn typed_lists_in_pages() {
    let names: Vec<String> = (0..7).map(|index| format!("service-{index}")).collect();
    let server = server_with(&names.iter().map(String::as_str).collect::<Vec<_>>());
    server.apply(json!({"kind": "Node", "metadata": {"name": "node1"}})).unwrap();
    server.apply(slice("a", &["10.0.0.1".to_owned()])).unwrap();
    run(async {
        let client = client(&server).await;
        let services: Api<Service> = Api::all(client.clone());
        let (mut pages, mut seen) = (Vec::new(), Vec::new());
        let mut parameters = ListParams::default().limit(3).labels(&format!("{LABEL}=kpng-example"));
        loop {
            let page = services.list(&parameters).await.unwrap();
            server.apply(service(&format!("service-0-{}", pages.len()))).unwrap();
            pages.push(page.items.len());
            seen.extend(page.items.iter().map(kube::ResourceExt::name_any));
            match page.metadata.continue_ {
                Some(token) => parameters = parameters.continue_token(&token),
                None => break,
            }
        }
        assert_eq!((pages, seen), (vec![3, 3, 1], names));
        let node = Api::<Node>::all(client.clone()).get("node1").await.unwrap();
        assert_eq!(
            node.uid(),
            server.get("Node", "", "node1").unwrap()["metadata"]["uid"].as_str().map(str::to_owned)
        );
        let slices = Api::<EndpointSlice>::all(client.clone()).list(&ListParams::default()).await.unwrap();
        assert_eq!(slices.items[0].endpoints[0].addresses, ["10.0.0.1"]);
        assert_eq!(client.apiserver_version().await.unwrap().minor, "36");
    });
}

#[test]
fn a_watcher_follows_objects_in_and_out_of_its_selection() {
    let server = server_with(&["a", "b", "c"]);
    run(async {
        let services: Api<Service> = Api::all(client(&server).await);
        let config = watcher::Config::default().labels(&format!("{LABEL}=kpng-example")).page_size(2);
        let mut stream = Box::pin(watcher(services, config).default_backoff());
        let mut view = View::default();
        view.until(&mut stream, |view| view.lists == 1).await;
        assert_eq!(view.names(), ["a", "b", "c"]);
        let mut unlabelled = service("a");
        unlabelled["metadata"]["labels"] = json!({});
        server.apply(unlabelled).unwrap();
        server.delete("Service", "default", "b").unwrap();
        server.apply(service("d")).unwrap();
        view.until(&mut stream, |view| view.objects.contains_key("d")).await;
        assert_eq!(view.names(), ["c", "d"]);
        server.apply(service("a")).unwrap();
        view.until(&mut stream, |view| view.objects.contains_key("a")).await;
        assert_eq!(view.lists, 1);
        let lists = server.requests().iter().filter(|request| request.verb != Verb::Watch).count();
        assert_eq!(lists, 2, "two pages");
    });
}

#[test]
fn a_watcher_lists_again_after_gone_in_its_stream_and_after_a_compaction() {
    let server = server_with(&["a"]);
    run(async {
        let services: Api<Service> = Api::all(client(&server).await);
        let mut stream = Box::pin(watcher(services, watcher::Config::default()).default_backoff());
        let mut view = View::default();
        view.until(&mut stream, |view| view.lists == 1).await;
        server.inject(Fault::new(Kind::GoneInStream).times(1));
        view.until(&mut stream, |view| view.lists == 2).await;
        // The watcher begins to watch when it is asked for more.
        let _nothing = tokio::time::timeout(Duration::from_millis(50), stream.next()).await;
        server.down().unwrap();
        server.apply(service("b")).unwrap();
        server.compact();
        server.up().unwrap();
        view.until(&mut stream, |view| view.lists == 3).await;
        assert_eq!(view.names(), ["a", "b"]);
    });
}

#[test]
fn a_watcher_gets_over_everything_that_is_said_aloud() {
    // Nothing but a client's own patience gets over silence; and of an event that is lost kube's watcher only says so.
    let aloud = |kind: &Kind| {
        use Kind::{LostAsNotJson, LostAsOtherShape, Silence, Stall};
        !matches!(kind, Silence | Stall { .. } | LostAsNotJson | LostAsOtherShape)
    };
    std::thread::scope(|scope| {
        for kind in Kind::ALL.into_iter().filter(aloud) {
            scope.spawn(move || get_over(kind));
        }
    });
}

fn get_over(kind: Kind) {
    let server = server_with(&["a"]);
    run(async {
        let services: Api<Service> = Api::all(client(&server).await);
        let fault = Fault::new(kind).of(Resource::Services).times(1);
        let list = server.inject(fault.on(Verb::List));
        let mut stream = Box::pin(watcher(services, watcher::Config::default()).default_backoff());
        let mut view = View::default();
        view.until(&mut stream, |view| view.lists >= 1).await;
        let watch = server.inject(fault.on(Verb::Watch));
        server.cut_watches();
        touch(&server, "a", "after");
        server.apply(service("b")).unwrap();
        let is_present = |view: &View| {
            view.objects.contains_key("b") && view.objects["a"].annotations().contains_key("touched")
        };
        view.until(&mut stream, is_present).await;
        assert_eq!(server.hits(watch), 1, "{kind:?}");
        let of_watches_only = matches!(kind, Kind::GoneInStream | Kind::Duplicates);
        assert_eq!(server.hits(list), u32::from(!of_watches_only), "{kind:?}");
    });
}

#[test]
fn errors_are_read_as_the_real_servers_are() {
    let server = server_with(&["a"]);
    run(async {
        let services: Api<Service> = Api::all(client(&server).await);
        for (kind, code, reason) in [
            (Kind::Unauthorized, 401, "Unauthorized"),
            (Kind::Forbidden, 403, "Forbidden"),
            (Kind::Gone, 410, "Expired"),
        ] {
            server.inject(Fault::new(kind).times(1));
            match services.list(&ListParams::default()).await.unwrap_err() {
                kube::Error::Api(status) => assert_eq!((status.code, status.reason.as_str()), (code, reason)),
                other => panic!("{other}"),
            }
        }
    });
}

#[test]
fn reports_become_events_and_the_second_of_a_kind_a_series() {
    let server = server_with(&["a"]);
    run(async {
        let reporter = Reporter { controller: "proxier".to_owned(), instance: Some("node1".to_owned()) };
        let recorder = Recorder::new(client(&server).await, reporter);
        let report = Report {
            type_: EventType::Warning,
            reason: "AddressConflict".to_owned(),
            note: Some("10.0.0.55 is another Service's".to_owned()),
            action: "Claim".to_owned(),
            secondary: None,
        };
        let about = ObjectReference {
            kind: Some("Service".to_owned()),
            namespace: Some("default".to_owned()),
            name: Some("a".to_owned()),
            ..ObjectReference::default()
        };
        recorder.publish(&report, &about).await.unwrap();
        recorder.publish(&report, &about).await.unwrap();
        let [event] = &server.events()[..] else { panic!("{:?}", server.events()) };
        assert_eq!(event["reason"], "AddressConflict");
        assert_eq!(event["regarding"]["name"], "a");
        assert_eq!(event["series"]["count"], 2);
    });
}

#[test]
fn a_client_comes_back_when_the_server_does() {
    let server = server_with(&["a"]);
    run(async {
        let services: Api<Service> = Api::all(client(&server).await);
        let mut stream = Box::pin(watcher(services, watcher::Config::default()).default_backoff());
        let mut view = View::default();
        view.until(&mut stream, |view| view.lists == 1).await;
        server.down().unwrap();
        server.apply(service("b")).unwrap();
        assert!(
            tokio::time::timeout(PATIENCE, stream.next()).await.is_ok_and(|event| event.unwrap().is_err())
        );
        server.up().unwrap();
        view.until(&mut stream, |view| view.objects.contains_key("b")).await;
    });
}
