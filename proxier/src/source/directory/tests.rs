use std::os::unix::fs::symlink;

use super::*;

struct Lab {
    dir: tempfile::TempDir,
    directory: Directory,
}

impl Lab {
    fn new() -> Self {
        Self::selecting(None)
    }

    fn selecting(name: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(dir.path().to_owned(), name.map(str::to_owned)).unwrap();
        Self { dir, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Events (`+` applied, `-` deleted) and problems, without the directory's name.
    fn read(&mut self) -> (Vec<String>, Vec<String>) {
        let batch = self.directory.read();
        let events = batch.events.iter().map(|event| match event {
            Event::Apply(object) => format!("+{}", object.id()),
            Event::Delete(id) => format!("-{id}"),
        });
        let prefix = format!("{}/", self.dir.path().display());
        let problems =
            batch.problems.iter().flatten().map(|problem| problem.to_string().replace(&prefix, ""));
        (events.collect(), problems.collect())
    }

    fn events(&mut self) -> Vec<String> {
        let (events, problems) = self.read();
        assert_eq!(problems, [""; 0]);
        events
    }
}

fn service(name: &str, external: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  labels: {{service.kubernetes.io/service-proxy-name: \
         proxier}}\nspec: {{externalIPs: [{external}]}}\n---\n"
    )
}

fn node(name: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n---\n")
}

const NONE: [&str; 0] = [];

#[test]
fn all_manifests_are_read_and_nothing_else() {
    let mut lab = Lab::new();
    for name in ["a.yaml", "b.yml"] {
        lab.write(name, &service(&name[..1], "10.0.0.55"));
    }
    lab.write("c.json", r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "c"}}"#);
    for name in
        [".a.yaml.swp", ".a.yaml", ".#a.yaml", "a.yaml~", "#a.yaml#", "4913", "README.md", "a.yaml.bak"]
    {
        lab.write(name, "not: [yaml");
    }
    fs::create_dir(lab.path("sub.yaml")).unwrap();
    lab.write("sub.yaml/d.yaml", &node("d"));
    assert_eq!(lab.events(), ["+Service default/a", "+Service default/b", "+Node c"]);
    assert_eq!(lab.events(), NONE);
}

#[test]
fn only_what_changed_is_delivered() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &(service("web", "10.0.0.55") + &node("node1")));
    assert_eq!(lab.events(), ["+Service default/web", "+Node node1"]);
    lab.write("a.yaml", &(service("web", "10.0.0.56") + &node("node1")));
    assert_eq!(lab.events(), ["+Service default/web"]);
    lab.write("a.yaml", &service("web", "10.0.0.56"));
    assert_eq!(lab.events(), ["-Node node1"]);
}

#[test]
fn a_broken_file_keeps_its_last_good_objects() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &service("web", "10.0.0.55"));
    lab.write("b.yaml", &node("node1"));
    lab.events();
    lab.write("a.yaml", "kind: Service\nmetadata: {\n");
    lab.write("b.yaml", &node("node2"));
    let (events, problems) = lab.read();
    assert_eq!(events, ["-Node node1", "+Node node2"]);
    assert_eq!(problems.len(), 1);
    assert!(problems[0].starts_with("a.yaml:2:11: unclosed"), "{problems:?}");
    // It stays reported, so that whoever asks later learns of it, and comes right when the file does.
    assert_eq!(lab.read(), (vec![], problems));
    lab.write("a.yaml", &service("web", "10.0.0.56"));
    assert_eq!(lab.events(), ["+Service default/web"]);
}

#[test]
fn a_file_that_was_never_good_does_not_keep_others_from_counting() {
    let mut lab = Lab::new();
    lab.write("a.yaml", "kind: [");
    lab.write("b.yaml", &node("node1"));
    let (events, problems) = lab.read();
    assert_eq!(events, ["+Node node1"]);
    assert_eq!(problems.len(), 1);
}

#[test]
fn a_file_removed_or_emptied_removes_its_objects() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &service("web", "10.0.0.55"));
    lab.write("b.yaml", &node("node1"));
    lab.events();
    fs::remove_file(lab.path("a.yaml")).unwrap();
    lab.write("b.yaml", "");
    assert_eq!(lab.events(), ["-Service default/web", "-Node node1"]);
}

#[test]
fn of_two_definitions_the_first_by_file_and_position_counts_and_the_other_is_reported() {
    let mut lab = Lab::new();
    lab.write("b.yaml", &service("web", "10.0.0.55"));
    lab.write("a.yaml", &(service("web", "10.0.0.56") + &service("web", "10.0.0.57")));
    let (events, problems) = lab.read();
    assert_eq!(events, ["+Service default/web"]);
    let Some(Object::Service(web)) = lab.directory.delivered.values().next() else { panic!() };
    assert_eq!(web.external_ips, ["10.0.0.56".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(problems.len(), 2);
    assert!(
        problems[0].starts_with("a.yaml:8:1: Service default/web: is already defined at "),
        "{problems:?}"
    );
    assert!(problems[0].contains("a.yaml:1:1: this one is left out"), "{problems:?}");
    assert!(
        problems[1].starts_with("b.yaml:1:1: Service default/web: is already defined at "),
        "{problems:?}"
    );

    fs::remove_file(lab.path("a.yaml")).unwrap();
    assert_eq!(lab.events(), ["+Service default/web"]);
}

#[test]
fn a_service_without_the_label_is_left_alone_and_mentioned() {
    let mut lab = Lab::new();
    lab.write("a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n");
    let (events, problems) = lab.read();
    assert_eq!(events, NONE);
    assert!(problems[0].starts_with("a.yaml:1:1: Service default/web: metadata.labels["), "{problems:?}");
}

#[test]
fn with_a_name_only_services_of_that_name_count_and_slices_need_no_label() {
    let mut lab = Lab::selecting(Some("other"));
    lab.write("a.yaml", &service("web", "10.0.0.55"));
    lab.write(
        "b.yaml",
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s, labels: \
         {kubernetes.io/service-name: web}}\naddressType: IPv4\nendpoints: []\n",
    );
    let (events, problems) = lab.read();
    assert_eq!(events, ["+EndpointSlice default/s"]);
    assert!(problems[0].contains("is not \"other\", the --service-proxy-name"), "{problems:?}");

    let mut lab = Lab::selecting(Some("proxier"));
    lab.write("a.yaml", &service("web", "10.0.0.55"));
    assert_eq!(lab.events(), ["+Service default/web"]);
}

#[test]
fn a_service_whose_label_goes_is_deleted() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &service("web", "10.0.0.55"));
    lab.events();
    lab.write("a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n");
    assert_eq!(lab.read().0, ["-Service default/web"]);
}

#[test]
fn a_config_map_mount_is_read_through_its_symbolic_links() {
    let mut lab = Lab::new();
    let dir = lab.dir.path().to_owned();
    let publish = |version: &str, text: &str| {
        fs::create_dir(dir.join(version)).unwrap();
        fs::write(dir.join(version).join("a.yaml"), text).unwrap();
        symlink(version, dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    };
    publish("..2026_01", &service("web", "10.0.0.55"));
    symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
    assert_eq!(lab.events(), ["+Service default/web"]);
    publish("..2026_02", &service("web", "10.0.0.56"));
    assert_eq!(lab.events(), ["+Service default/web"]);
}

#[test]
fn a_link_that_leads_nowhere_is_named_and_has_no_objects() {
    let mut lab = Lab::new();
    lab.write("target", &service("web", "10.0.0.55"));
    symlink("target", lab.path("a.yaml")).unwrap();
    assert_eq!(lab.events(), ["+Service default/web"]);
    fs::remove_file(lab.path("target")).unwrap();
    let (events, problems) = lab.read();
    assert_eq!(events, ["-Service default/web"]);
    assert_eq!(problems.len(), 1);
    assert!(problems[0].contains("a.yaml: is a symbolic link that leads nowhere"), "{problems:?}");
    lab.write("target", &service("web", "10.0.0.55"));
    assert_eq!(lab.events(), ["+Service default/web"]);
}

#[test]
fn a_directory_that_goes_away_leaves_everything_as_it_was() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &service("web", "10.0.0.55"));
    lab.events();
    let aside = lab.dir.path().with_extension("aside");
    fs::rename(lab.dir.path(), &aside).unwrap();
    let (events, problems) = lab.read();
    assert_eq!(events, NONE);
    assert!(problems[0].contains("cannot be listed"), "{problems:?}");
    fs::rename(&aside, lab.dir.path()).unwrap();
    assert_eq!(lab.events(), NONE);
}

#[test]
fn a_single_file_is_read_whatever_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("manifest");
    fs::write(&file, node("node1")).unwrap();
    fs::write(dir.path().join("other.yaml"), node("node2")).unwrap();
    let mut directory = Directory::open(file.clone(), None).unwrap();
    assert_eq!(directory.watched(), dir.path());
    assert_eq!(directory.read().events.len(), 1);
    fs::remove_file(&file).unwrap();
    let ObjectId::Node(name) = directory
        .read()
        .events
        .iter()
        .find_map(|event| match event {
            Event::Delete(id) => Some(id.clone()),
            Event::Apply(_) => None,
        })
        .unwrap()
    else {
        panic!()
    };
    assert_eq!(name.as_str(), "node1");
}

#[test]
fn an_input_that_does_not_exist_is_an_error_that_names_it() {
    let error = Directory::open("/nonexistent/proxier".into(), None).unwrap_err();
    assert_eq!(
        format!("{error:#}"),
        "cannot read --input /nonexistent/proxier: name a directory or a file: No such file or directory (os error 2)"
    );
    assert!(
        Directory::open("/dev/null".into(), None).unwrap_err().to_string().contains("neither a directory")
    );
}
