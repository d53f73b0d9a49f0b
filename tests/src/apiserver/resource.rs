//! The few resources that the double serves, and how each is spelled where.

use std::fmt;

use serde_json::{Map, Value, json};

/// A resource of the Kubernetes API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// `v1` Services.
    Services,
    /// `v1` Nodes, which are in no namespace.
    Nodes,
    /// `discovery.k8s.io/v1` EndpointSlices.
    EndpointSlices,
    /// `events.k8s.io/v1` Events, which clients write.
    Events,
}

impl Resource {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Services, Self::Nodes, Self::EndpointSlices, Self::Events];

    /// Its API group; the core group's name is empty.
    #[must_use]
    pub const fn group(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes => "",
            Self::EndpointSlices => "discovery.k8s.io",
            Self::Events => "events.k8s.io",
        }
    }

    /// As in a path.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Nodes => "nodes",
            Self::EndpointSlices => "endpointslices",
            Self::Events => "events",
        }
    }

    /// As in a manifest.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Services => "Service",
            Self::Nodes => "Node",
            Self::EndpointSlices => "EndpointSlice",
            Self::Events => "Event",
        }
    }

    /// As in a manifest.
    #[must_use]
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
            Self::Events => "events.k8s.io/v1",
        }
    }

    /// Whether its objects are in namespaces.
    #[must_use]
    pub const fn is_namespaced(self) -> bool {
        !matches!(self, Self::Nodes)
    }

    /// The resource of a manifest's kind.
    #[must_use]
    pub fn of_kind(kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|resource| resource.kind() == kind)
    }

    /// The resource at a path's group, version and plural.
    pub(super) fn at(api_version: &str, plural: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|resource| resource.api_version() == api_version && resource.plural() == plural)
    }

    /// With its group, as messages of errors name it: `endpointslices.discovery.k8s.io`.
    pub(super) fn qualified(self) -> String {
        match self.group() {
            "" => self.plural().to_owned(),
            group => format!("{}.{group}", self.plural()),
        }
    }

    /// What a bookmark's object has besides a resourceVersion: the fields that Go does not leave out when empty.
    pub(super) fn empty_fields(self) -> Map<String, Value> {
        let fields = match self {
            Self::Services => json!({"spec": {}, "status": {"loadBalancer": {}}}),
            Self::Nodes => json!({"spec": {}, "status": {
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
                "nodeInfo": {
                    "machineID": "", "systemUUID": "", "bootID": "", "kernelVersion": "", "osImage": "",
                    "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "",
                    "operatingSystem": "", "architecture": "",
                },
            }}),
            Self::EndpointSlices => json!({"addressType": "", "endpoints": null, "ports": null}),
            Self::Events => json!({"eventTime": null, "regarding": {}}),
        };
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.plural())
    }
}
