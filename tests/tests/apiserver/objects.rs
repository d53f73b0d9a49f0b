//! Objects for the tests.

use proxier_tests::apiserver::ApiServer;
use serde_json::{Value, json};

pub(crate) const SERVICES: &str = "/api/v1/services";
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
/// The label that the recordings select by.
pub(crate) const LABEL: &str = "service.kubernetes.io/service-proxy-name";

pub(crate) fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "labels": {LABEL: "kpng-example"}},
        "spec": {"clusterIP": "None", "externalIPs": ["10.0.0.55"]},
    })
}

pub(crate) fn slice(name: &str, addresses: &[String]) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|address| json!({"addresses": [address], "conditions": {"ready": true}, "nodeName": "node1"}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [],
    })
}

pub(crate) fn server_with(names: &[&str]) -> ApiServer {
    let server = ApiServer::start().unwrap();
    for name in names {
        server.apply(service(name)).unwrap();
    }
    server
}

/// The Service with another annotation, so that it changes.
pub(crate) fn touch(server: &ApiServer, name: &str, value: &str) {
    let mut service = service(name);
    service["metadata"]["annotations"] = json!({"touched": value});
    server.apply(service).unwrap();
}

pub(crate) fn names(list: &Value) -> Vec<&str> {
    list["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].as_str().unwrap()).collect()
}
