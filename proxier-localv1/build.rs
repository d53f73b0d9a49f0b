//! Makes kpng's API out of its definition, without `protoc`: messages, client and server, and the description of it all
//! that gRPC reflection hands out.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const DEFINITION: &str = "proto/localv1.proto";

/// What kpng-json prints of a Service and an endpoint, but the Service itself: Go has its `oneof` at another place among the
/// fields.
const PRINTED: [&str; 8] = [
    "ServiceIPs",
    "IPSet",
    "IPFilter",
    "PortMapping",
    "ClientIPAffinity",
    "Endpoint",
    "EndpointScopes",
    "PortName",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={DEFINITION}");
    let descriptors = protox::compile([DEFINITION], ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("localv1.binpb"), descriptors.encode_to_vec())?;

    let mut config = tonic_prost_build::Config::new();
    // A value is handed from the network to where it is decoded, and from where it is kept to the network, uncopied.
    config.bytes(["."]);
    config.enable_type_names();
    config.btree_map(["."]);
    // As Go's JSON does it: by the names in the definition, without what says nothing.
    let messages = descriptors.file.iter().flat_map(|file| &file.message_type);
    for message in messages.filter(|message| PRINTED.contains(&message.name())) {
        let path = format!(".localv1.{}", message.name());
        config.type_attribute(&path, "#[derive(serde::Serialize)]");
        for field in &message.field {
            config.field_attribute(
                format!("{path}.{}", field.name()),
                format!(
                    r#"#[serde(rename = "{}", skip_serializing_if = "super::is_default")]"#,
                    field.json_name()
                ),
            );
        }
    }
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
