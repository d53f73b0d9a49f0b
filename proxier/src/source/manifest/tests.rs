use super::*;

fn parse_named(name: &str, text: &str) -> Result<Manifest, Vec<Problem>> {
    parse(Path::new(name), text.as_bytes())
}

fn ids(manifest: &Manifest) -> Vec<String> {
    manifest.objects.iter().map(|(object, place)| format!("{} {}", place.line, object.id())).collect()
}

fn errors(name: &str, text: &str) -> Vec<String> {
    parse_named(name, text).unwrap_err().iter().map(ToString::to_string).collect()
}

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n";
const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata:\n  name: node1\n";

#[test]
fn many_documents_of_a_file_are_read_each_with_its_line() {
    let text = format!("# a comment\n---\n{WEB}---\n# nothing here\n---\n{NODE}...\n---\n\n{WEB}");
    let manifest = parse_named("a.yaml", &text).unwrap();
    assert_eq!(ids(&manifest), ["3 Service default/web", "9 Node node1", "16 Service default/web"]);
    assert_eq!(manifest.problems, []);
}

#[test]
fn an_error_in_the_third_document_has_the_line_of_the_file() {
    let text = format!(
        "{NODE}---\n{WEB}---\napiVersion: v1\nkind: Service\nmetadata:\n  name: x\nspec:\n  ports:\n  - port: abc\n"
    );
    assert_eq!(
        errors("a.yaml", &text),
        [
            "a.yaml:16:11: invalid i32; correct the file; until then what it said last, if anything, stays in force"
        ]
    );
}

#[test]
fn a_syntax_error_has_line_and_column() {
    let text = format!("{WEB}---\nkind: Service\nmetadata:\n  a: b\n   c: d\n");
    let errors = errors("a.yaml", &text);
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("a.yaml:8:5: mapping values are not allowed"), "{errors:?}");
}

#[test]
fn every_broken_document_of_a_file_is_reported() {
    let errors = errors("a.yaml", "kind: [\n---\n\tkind: Service\n---\nhello\n");
    assert_eq!(errors.len(), 3, "{errors:?}");
    assert!(errors[1].starts_with("a.yaml:3:"), "{errors:?}");
    assert!(errors[2].starts_with("a.yaml:5:1: "), "{errors:?}");
}

#[test]
fn a_file_of_nothing_says_nothing() {
    for text in ["", "\n\n", "# only this\n", "---\n---\n", "%YAML 1.2\n---\n# x\n...\n", "\u{feff}"] {
        assert_eq!(parse_named("a.yaml", text), Ok(Manifest::default()), "{text:?}");
    }
    assert_eq!(parse_named("a.json", " \n"), Ok(Manifest::default()));
}

#[test]
fn flow_style_is_read_like_block_style() {
    let text = "--- {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: s, labels: \
                {kubernetes.io/service-name: web}}, addressType: IPv6, endpoints: [{nodeName: node1, addresses: \
                [1100::202], conditions: {ready: yes}}]}\n";
    let manifest = parse_named("a.yaml", text).unwrap();
    let Object::EndpointSlice(slice) = &manifest.objects[0].0 else { panic!("{manifest:?}") };
    assert_eq!(*slice.endpoints[0].addresses, ["1100::202".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(slice.endpoints[0].node.as_ref().unwrap().as_str(), "node1");
    assert_eq!(manifest.problems, []);
}

#[test]
fn a_number_where_a_string_belongs_is_refused_as_kubectl_does() {
    let errors = errors("a.yaml", "apiVersion: v1\nkind: Service\nmetadata:\n  name: 123\n");
    assert!(errors[0].starts_with("a.yaml:4:9: "), "{errors:?}");
    let quoted = parse_named("a.yaml", "apiVersion: v1\nkind: Service\nmetadata:\n  name: '123'\n").unwrap();
    assert_eq!(ids(&quoted), ["1 Service default/123"]);
}

#[test]
fn a_key_written_twice_is_refused() {
    let errors = errors("a.yaml", &format!("{WEB}kind: Service\n"));
    assert!(errors[0].starts_with("a.yaml:4:1: duplicate mapping key"), "{errors:?}");
}

#[test]
fn other_kinds_are_mentioned_once_and_ignored() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeName: node1, items: 3}\n";
    let text = format!("{pod}---\n{pod}---\n{WEB}---\napiVersion: serving.knative.dev/v1\nkind: Service\n");
    let manifest = parse_named("a.yaml", &text).unwrap();
    assert_eq!(ids(&manifest), ["11 Service default/web"]);
    let problems: Vec<_> = manifest.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "a.yaml:2:7: kind \"v1 Pod\" is not a kind that proxier reads: ignored; it reads v1 Service, \
         discovery.k8s.io/v1 EndpointSlice, v1 Node and lists of them",
            "a.yaml:16:7: kind \"serving.knative.dev/v1 Service\" is not a kind that proxier reads: ignored; it reads v1 \
         Service, discovery.k8s.io/v1 EndpointSlice, v1 Node and lists of them",
        ]
    );
}

#[test]
fn a_list_is_read_item_by_item_and_other_kinds_in_it_are_ignored() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: p}\n- \
                apiVersion: v1\n  kind: Service\n  metadata: {name: web}\n- {apiVersion: v1, kind: Node, metadata: \
                {name: node1}}\n";
    let manifest = parse_named("a.yaml", text).unwrap();
    assert_eq!(ids(&manifest), ["7 Service default/web", "10 Node node1"]);
    assert_eq!(manifest.problems.len(), 1);
}

#[test]
fn items_of_a_service_list_need_no_kind() {
    let text = "kind: ServiceList\napiVersion: v1\nmetadata: {resourceVersion: '1'}\nitems:\n- metadata: {name: \
                web}\n- metadata: {name: mail, namespace: x}\n";
    assert_eq!(ids(&parse_named("a.yaml", text).unwrap()), ["5 Service default/web", "6 Service x/mail"]);
    for empty in ["items: []", "items: null", ""] {
        let text = format!("apiVersion: v1\nkind: ServiceList\n{empty}\n");
        assert_eq!(parse_named("a.yaml", &text), Ok(Manifest::default()), "{empty}");
    }
}

#[test]
fn an_error_within_a_list_has_its_line_and_column() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: web}\n  \
                spec:\n    externalIPs: 10.0.0.55\n";
    assert!(
        errors("a.yaml", text)[0].starts_with("a.yaml:8:18: expected sequence"),
        "{:?}",
        errors("a.yaml", text)
    );
}

#[test]
fn json_is_read_also_several_values_in_a_file() {
    let text = "{\n\t\"apiVersion\": \"v1\", \"kind\": \"Service\",\n\t\"metadata\": {\"name\": \"web\", \
                \"annotations\": {\"a\": \"{\\\"b\\\":\\\"\\u00e4\\\\n\\\"}\\n\"}}\n} {\"apiVersion\": \"v1\", \
                \"kind\": \"Node\", \"metadata\": {\"name\": \"node1\"}}\n";
    let manifest = parse_named("a.json", text).unwrap();
    assert_eq!(ids(&manifest), ["1 Service default/web", "4 Node node1"]);
    let Object::Service(service) = &manifest.objects[0].0 else { panic!("{manifest:?}") };
    assert_eq!(&service.annotations["a"], "{\"b\":\"ä\\n\"}\n");
}

#[test]
fn errors_in_json_have_line_and_column() {
    assert!(
        errors("a.json", "{\n  \"kind\": \"Service\"\n  \"x\": 1\n}")[0]
            .starts_with("a.json:3:3: expected `,`")
    );
    let text = "{\"apiVersion\": \"v1\", \"kind\": \"Node\", \"metadata\": {\"name\": \"n\"}} \
                {\"apiVersion\": \"v1\", \"kind\": \"Service\", \"spec\": 3}";
    let column = text.rfind('3').unwrap() + 1;
    let errors = errors("a.json", text);
    assert!(errors[0].starts_with(&format!("a.json:1:{column}: ")), "{errors:?}");
}

#[test]
fn an_object_without_kind_version_or_name_is_an_error_with_its_place() {
    assert!(errors("a.yaml", "# x\nmetadata: {name: a}\n")[0].starts_with("a.yaml:2:1: has no kind"));
    assert!(errors("a.yaml", "kind: Service\n")[0].starts_with("a.yaml:1:1: has no apiVersion"));
    let text = format!("{NODE}---\nkind: Service\napiVersion: v1\n");
    assert!(errors("a.yaml", &text)[0].starts_with("a.yaml:6:1: Service has no metadata.name"));
}

#[test]
fn problems_of_an_object_have_its_place() {
    let manifest = parse_named("a.yaml", &format!("{NODE}---\n{WEB}spec: {{externalIPs: [x]}}\n")).unwrap();
    assert!(
        manifest.problems[0]
            .to_string()
            .starts_with("a.yaml:6:1: Service default/web: spec.externalIPs[0] \"x\" "),
        "{}",
        manifest.problems[0]
    );
}

#[test]
fn a_service_that_is_not_taken_costs_nothing_else_of_the_file() {
    let long = "s".repeat(64);
    let text = format!("{NODE}---\napiVersion: v1\nkind: Service\nmetadata: {{name: {long}}}\n---\n{WEB}");
    let manifest = parse_named("a.yaml", &text).unwrap();
    assert_eq!(ids(&manifest), ["1 Node node1", "10 Service default/web"]);
    let problems: Vec<_> = manifest.problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems.len(), 1, "{problems:?}");
    let start = format!("a.yaml:6:1: Service default/{long}: metadata.name is longer than 63 bytes");
    assert!(problems[0].starts_with(&start), "{problems:?}");
}

#[test]
fn an_alias_bomb_is_refused() {
    let mut text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nl0: &l0 x\n".to_owned();
    for level in 1..12 {
        let aliases = vec![format!("*l{}", level - 1); 10].join(",");
        text += &format!("l{level}: &l{level} [{aliases}]\n");
    }
    assert_eq!(errors("a.yaml", &text).len(), 1);
}

#[test]
fn anchors_and_aliases_of_people_are_read() {
    let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: &name web\n  labels: {app: *name}\n";
    let manifest = parse_named("a.yaml", text).unwrap();
    let Object::Service(service) = &manifest.objects[0].0 else { panic!("{manifest:?}") };
    assert_eq!(&service.labels["app"], "web");
}

#[test]
fn a_file_that_is_no_text_is_refused_with_the_place_of_the_first_bad_byte() {
    let problems = parse(Path::new("a.yaml"), b"kind: x\nab\xffcd").unwrap_err();
    assert!(problems[0].to_string().starts_with("a.yaml:2:3: is not UTF-8"), "{}", problems[0]);
}

#[test]
fn a_message_is_one_line_whatever_the_file_holds() {
    let problems =
        errors("a.yaml", "apiVersion: v1\nkind: Service\n\"a\\nb\\e[31m\": 1\n\"a\\nb\\e[31m\": 1\n");
    assert!(!problems[0].contains(|c: char| c.is_control()), "{problems:?}");
}

#[test]
fn a_kind_that_is_nearly_one_of_ours_is_a_warning_that_says_what_to_write() {
    for (api_version, kind, meant) in [
        ("v1", "service", Some("write apiVersion: v1 and kind: Service")),
        ("v1beta1", "Node", Some("write apiVersion: v1 and kind: Node")),
        (
            "discovery.k8s.io/v1beta1",
            "Endpointslice",
            Some("write apiVersion: discovery.k8s.io/v1 and kind: EndpointSlice"),
        ),
        ("serving.knative.dev/v1", "Service", None),
        ("v1", "EndpointSlice", Some("write apiVersion: discovery.k8s.io/v1 and kind: EndpointSlice")),
        ("v1", "Pod", None),
    ] {
        let text = format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: web}}\n");
        let manifest = parse_named("a.yaml", &text).unwrap();
        assert_eq!(manifest.objects, []);
        let [problem] = &manifest.problems[..] else { panic!("{:?}", manifest.problems) };
        let severity = if meant.is_some() { Severity::Warning } else { Severity::Info };
        assert_eq!(problem.severity, severity, "{problem}");
        assert!(problem.to_string().ends_with(meant.unwrap_or("and lists of them")), "{problem}");
    }
}

#[test]
fn a_name_that_yaml_takes_for_a_number_is_to_be_quoted() {
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: 5}\n";
    let errors = errors("a.yaml", text);
    assert!(errors[0].starts_with("a.yaml:3:18: 5 is no string: put it in quotes;"), "{errors:?}");
}

#[test]
fn a_list_of_ten_thousand_services_is_read() {
    let mut text = "apiVersion: v1\nkind: List\nitems:\n".to_owned();
    for n in 0..10_000 {
        text += &format!(
            "- apiVersion: v1\n  kind: Service\n  metadata: {{name: s{n}, namespace: d, labels: {{a: b, c: d}}}}\n  \
             spec: {{externalIPs: [10.1.{}.{}], ports: [{{port: 80, protocol: TCP, name: a}}]}}\n",
            n / 250,
            n % 250 + 1
        );
    }
    assert_eq!(parse_named("a.yaml", &text).unwrap().objects.len(), 10_000);
}
