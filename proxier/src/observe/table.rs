//! Rows for people and for programs: `-o table|wide|json|yaml`. The rows are `sink::bpf::inspect`'s.

use std::net::IpAddr;

use anyhow::Context as _;
use comfy_table::{Table, presets};
use ipnet::IpNet;
use serde::Serialize;

use crate::{
    desired::Balance,
    sink::bpf::inspect::{DropRow, EndpointRow, FlowRow, ServiceRow, SessionRow, StatisticRow},
};

/// How rows are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// Columns that fit a terminal.
    #[default]
    Table,
    /// All columns.
    Wide,
    /// One JSON array.
    Json,
    /// One YAML list.
    Yaml,
}

/// Something that is listed, one a line.
pub trait TableRow: Serialize {
    /// What it is called when there is none.
    const PLURAL: &'static str;
    /// Names of the columns; those from the second number on are for [`Output::Wide`] alone.
    const COLUMNS: (&'static [&'static str], usize);

    /// One cell a column.
    fn cells(&self) -> Vec<String>;

    /// The same for [`Output::Wide`], which may tell in full what a terminal has no room for.
    fn wide_cells(&self) -> Vec<String> {
        self.cells()
    }

    /// Whether the row says nothing to a person at a terminal: [`Output::Table`] leaves it out.
    fn says_nothing(&self) -> bool {
        false
    }
}

/// The rows as text, ending with a newline.
///
/// # Errors
///
/// A row cannot be written as JSON or YAML.
pub fn render<R: TableRow>(rows: &[R], output: Output) -> anyhow::Result<String> {
    match output {
        Output::Json => {
            Ok(serde_json::to_string_pretty(rows).context("cannot write the rows as JSON")? + "\n")
        }
        Output::Yaml => serde_saphyr::to_string(&rows).context("cannot write the rows as YAML"),
        Output::Table => {
            let rows = rows.iter().filter(|row| !row.says_nothing());
            Ok(columns::<R>(rows.map(TableRow::cells), R::COLUMNS.1))
        }
        Output::Wide => Ok(columns::<R>(rows.iter().map(TableRow::wide_cells), R::COLUMNS.0.len())),
    }
}

/// Plain columns without borders, as kubectl prints them, so that awk and cut work.
fn columns<R: TableRow>(rows: impl Iterator<Item = Vec<String>>, count: usize) -> String {
    let mut rows = rows.peekable();
    if rows.peek().is_none() {
        return format!("No {} found.\n", R::PLURAL);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(&R::COLUMNS.0[..count]);
    for mut cells in rows {
        cells.truncate(count);
        table.add_row(cells);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.trim_fmt() + "\n"
}

/// `namespace/name`; `-` if the table of names has lost it.
fn service(namespace: &str, name: &str) -> String {
    if name.is_empty() { "-".to_owned() } else { format!("{namespace}/{name}") }
}

/// An address with a port, if it has one.
fn socket(address: IpAddr, port: u16) -> String {
    match (address, port) {
        (_, 0) => address.to_string(),
        (IpAddr::V4(_), _) => format!("{address}:{port}"),
        (IpAddr::V6(_), _) => format!("[{address}]:{port}"),
    }
}

/// Who may send, by number: nobody must have to look twice to see that a Service is closed.
fn number_of_sources(nets: Option<&[IpNet]>) -> String {
    match nets {
        None => "any".to_owned(),
        Some([]) => "none".to_owned(),
        Some(nets) => nets.len().to_string(),
    }
}

/// Who may send, by network, without blanks. More networks than a line can hold are counted: programs read them all.
fn sources(nets: Option<&[IpNet]>) -> String {
    const SHOWN: usize = 5;
    let Some(nets @ [_, ..]) = nets else { return number_of_sources(nets) };
    let mut text = nets.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join(",");
    if nets.len() > SHOWN {
        text += &format!(",+{}", nets.len() - SHOWN);
    }
    text
}

fn dash_if_empty(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

fn dash_if_none(number: Option<u32>) -> String {
    number.map_or_else(|| "-".to_owned(), |number| number.to_string())
}

impl TableRow for ServiceRow {
    const PLURAL: &'static str = "services";
    const COLUMNS: (&'static [&'static str], usize) = (
        &[
            "SERVICE",
            "EXTERNAL",
            "PODS",
            "NO-BACKEND",
            "BALANCE",
            "SOURCES",
            "AFFINITY",
            "DELIVERY",
            "ID",
            "GENERATION",
        ],
        6,
    );

    fn cells(&self) -> Vec<String> {
        vec![
            service(&self.namespace, &self.name),
            self.external.to_string(),
            self.backends.to_string(),
            self.no_backend.to_owned(),
            self.balance.to_owned(),
            number_of_sources(self.sources.as_deref()),
            // A client of a Service whose every conversation is placed by itself stays on no pod.
            if self.balance == Balance::Flow.name() {
                "-".to_owned()
            } else {
                format!("{}s", self.affinity_timeout)
            },
            self.delivery.to_owned(),
            self.service_id.to_string(),
            self.generation.to_string(),
        ]
    }

    fn wide_cells(&self) -> Vec<String> {
        let mut cells = self.cells();
        cells[Self::SOURCES] = sources(self.sources.as_deref());
        cells
    }
}

impl ServiceRow {
    /// The column that tells who may send.
    const SOURCES: usize = 5;
}

impl TableRow for EndpointRow {
    const PLURAL: &'static str = "endpoints";
    const COLUMNS: (&'static [&'static str], usize) =
        (&["SERVICE", "POD", "STATE", "DELIVERY", "LINK", "ID", "GENERATION", "SLOT"], 3);

    fn cells(&self) -> Vec<String> {
        vec![
            service(&self.namespace, &self.name),
            self.pod.to_string(),
            self.state.name().to_owned(),
            self.delivery.to_owned(),
            dash_if_empty(self.link.as_deref().unwrap_or_default()),
            self.service_id.to_string(),
            dash_if_none(self.generation),
            dash_if_none(self.slot),
        ]
    }
}

impl TableRow for FlowRow {
    const PLURAL: &'static str = "flows";
    const COLUMNS: (&'static [&'static str], usize) =
        (&["SERVICE", "PROTOCOL", "CLIENT", "EXTERNAL", "POD", "STATE", "IDLE", "DELIVERY"], 7);

    fn cells(&self) -> Vec<String> {
        vec![
            service(&self.namespace, &self.name),
            self.protocol.clone(),
            socket(self.peer, self.peer_port),
            self.external.to_string(),
            socket(self.pod, self.pod_port),
            dash_if_empty(self.state),
            format!("{}s", self.idle_seconds),
            self.delivery.to_owned(),
        ]
    }
}

impl TableRow for SessionRow {
    const PLURAL: &'static str = "sessions";
    const COLUMNS: (&'static [&'static str], usize) =
        (&["SERVICE", "PROTOCOL", "CLIENT", "EXTERNAL", "POD", "IDLE"], 6);

    fn cells(&self) -> Vec<String> {
        vec![
            service(&self.namespace, &self.name),
            self.protocol.clone().unwrap_or_else(|| "any".to_owned()),
            socket(self.peer, self.peer_port),
            socket(self.external, self.external_port),
            self.pod.to_string(),
            format!("{}s", self.idle_seconds),
        ]
    }
}

impl TableRow for DropRow {
    const PLURAL: &'static str = "drops";
    const COLUMNS: (&'static [&'static str], usize) = (&["REASON", "HOOK", "PACKETS"], 3);

    fn cells(&self) -> Vec<String> {
        vec![self.reason.to_owned(), self.hook.to_owned(), self.packets.to_string()]
    }

    fn says_nothing(&self) -> bool {
        self.packets == 0
    }
}

impl TableRow for StatisticRow {
    const PLURAL: &'static str = "statistics";
    const COLUMNS: (&'static [&'static str], usize) = (&["STATISTIC", "COUNT"], 2);

    fn cells(&self) -> Vec<String> {
        vec![self.statistic.to_owned(), self.count.to_string()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::bpf::inspect::EndpointState;

    fn rows() -> Vec<ServiceRow> {
        [("default", "kpng-example", "10.0.0.55"), ("", "", "1000::55")]
            .into_iter()
            .map(|(namespace, name, external)| ServiceRow {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                external: external.parse().unwrap(),
                service_id: 7,
                generation: 3,
                backends: 2,
                affinity_timeout: 10_800,
                no_backend: "drop",
                balance: if name.is_empty() { "flow" } else { "client" },
                delivery: if name.is_empty() { "stack" } else { "direct" },
                sources: (!name.is_empty()).then(|| vec!["192.0.2.0/24".parse().unwrap()]),
            })
            .collect()
    }

    #[test]
    fn a_table_has_columns_without_borders() {
        insta::assert_snapshot!(render(&rows(), Output::Table).unwrap(), @r"
        SERVICE                EXTERNAL    PODS   NO-BACKEND   BALANCE   SOURCES
        default/kpng-example   10.0.0.55   2      drop         client    1
        -                      1000::55    2      drop         flow      any
        ");
    }

    #[test]
    fn a_wide_table_has_more_columns() {
        insta::assert_snapshot!(render(&rows(), Output::Wide).unwrap(), @r"
        SERVICE                EXTERNAL    PODS   NO-BACKEND   BALANCE   SOURCES        AFFINITY   DELIVERY   ID   GENERATION
        default/kpng-example   10.0.0.55   2      drop         client    192.0.2.0/24   10800s     direct     7    3
        -                      1000::55    2      drop         flow      any            -          stack      7    3
        ");
    }

    #[test]
    fn json_and_yaml_hold_the_same() {
        let json: serde_json::Value = serde_json::from_str(&render(&rows(), Output::Json).unwrap()).unwrap();
        let yaml: serde_json::Value =
            serde_saphyr::from_str(&render(&rows(), Output::Yaml).unwrap()).unwrap();
        assert_eq!(json, yaml);
        assert_eq!(json[0]["external"], "10.0.0.55");
        assert_eq!(json[0]["serviceId"], 7);
        assert_eq!(json[0]["sources"], serde_json::json!(["192.0.2.0/24"]));
        assert_eq!(json[1]["sources"], serde_json::Value::Null);
    }

    #[test]
    fn who_may_send_is_told_in_a_few_words() {
        let nets: Vec<IpNet> = (0..7).map(|n| format!("10.{n}.0.0/16").parse().unwrap()).collect();
        assert_eq!(sources(None), "any");
        assert_eq!(sources(Some(&[])), "none");
        assert_eq!(sources(Some(&nets[..2])), "10.0.0.0/16,10.1.0.0/16");
        assert!(sources(Some(&nets)).ends_with(",10.4.0.0/16,+2"), "{}", sources(Some(&nets)));
        assert_eq!([None, Some(&nets[..0]), Some(&nets)].map(number_of_sources), ["any", "none", "7"]);
    }

    #[test]
    fn a_pod_that_drains_has_no_slot() {
        let rows = [("11.0.2.2", EndpointState::Ready, Some(0)), ("11.0.2.3", EndpointState::Draining, None)]
            .map(|(pod, state, slot)| EndpointRow {
                namespace: "default".to_owned(),
                name: "web".to_owned(),
                pod: pod.parse().unwrap(),
                state,
                delivery: if slot.is_some() { "direct" } else { "stack" },
                link: slot.map(|_| "veth7".to_owned()),
                service_id: 7,
                generation: slot.map(|_| 3),
                slot,
            });
        insta::assert_snapshot!(render(&rows, Output::Table).unwrap(), @r"
        SERVICE       POD        STATE
        default/web   11.0.2.2   ready
        default/web   11.0.2.3   draining
        ");
        insta::assert_snapshot!(render(&rows, Output::Wide).unwrap(), @r"
        SERVICE       POD        STATE      DELIVERY   LINK    ID   GENERATION   SLOT
        default/web   11.0.2.2   ready      direct     veth7   7    3            0
        default/web   11.0.2.3   draining   stack      -       7    -            -
        ");
        let json: serde_json::Value = serde_json::from_str(&render(&rows, Output::Json).unwrap()).unwrap();
        for (row, read) in rows.iter().zip(json.as_array().unwrap()) {
            assert_eq!(read["state"], row.state.name());
            assert_eq!(read["slot"].is_null(), row.slot.is_none());
        }
    }

    #[test]
    fn nothing_to_list_is_said_to_people_and_an_empty_list_to_programs() {
        let none: [EndpointRow; 0] = [];
        assert_eq!(render(&none, Output::Table).unwrap(), "No endpoints found.\n");
        assert_eq!(render(&none, Output::Json).unwrap(), "[]\n");
    }

    #[test]
    fn drops_that_never_happened_are_for_wide_tables_and_programs() {
        let rows = [("no-backend", 0), ("flow-collision", 17)].map(|(reason, packets)| DropRow {
            reason,
            hook: "uplink-ingress",
            packets,
        });
        insta::assert_snapshot!(render(&rows, Output::Table).unwrap(), @r"
        REASON           HOOK             PACKETS
        flow-collision   uplink-ingress   17
        ");
        assert_eq!(render(&rows, Output::Wide).unwrap().lines().count(), 3);
        for output in [Output::Json, Output::Yaml] {
            assert!(render(&rows, output).unwrap().contains("no-backend"), "{output:?}");
        }
        assert_eq!(render(&rows[..1], Output::Table).unwrap(), "No drops found.\n");
    }

    #[test]
    fn statistics_are_listed_with_those_that_are_zero() {
        let rows = [("flow-inserted", 300_000), ("flow-evicted", 0)]
            .map(|(statistic, count)| StatisticRow { statistic, count });
        insta::assert_snapshot!(render(&rows, Output::Table).unwrap(), @r"
        STATISTIC       COUNT
        flow-inserted   300000
        flow-evicted    0
        ");
        let json: serde_json::Value = serde_json::from_str(&render(&rows, Output::Json).unwrap()).unwrap();
        assert_eq!(json[0], serde_json::json!({"statistic": "flow-inserted", "count": 300_000}));
    }

    #[test]
    fn a_session_is_a_line_from_client_to_pod_with_the_ports_if_it_is_of_one_conversation() {
        let row = SessionRow {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            external: "1000::55".parse().unwrap(),
            peer: "2000::1".parse().unwrap(),
            protocol: None,
            external_port: 0,
            peer_port: 0,
            pod: "1100::202".parse().unwrap(),
            idle_seconds: 12,
        };
        let conversation = SessionRow {
            protocol: Some("udp".to_owned()),
            external_port: 5060,
            peer_port: 42000,
            ..row.clone()
        };
        let rows = [row, conversation];
        insta::assert_snapshot!(render(&rows, Output::Table).unwrap(), @r"
        SERVICE       PROTOCOL   CLIENT            EXTERNAL          POD         IDLE
        default/web   any        2000::1           1000::55          1100::202   12s
        default/web   udp        [2000::1]:42000   [1000::55]:5060   1100::202   12s
        ");
        let json: serde_json::Value = serde_json::from_str(&render(&rows, Output::Json).unwrap()).unwrap();
        assert_eq!(json[0]["idleSeconds"], 12);
        assert_eq!(json[0]["peer"], "2000::1");
        assert_eq!(json[0]["protocol"], serde_json::Value::Null);
        assert_eq!(json[1]["protocol"], "udp");
    }

    #[test]
    fn a_port_of_an_ipv6_address_can_be_told_from_the_address() {
        assert_eq!(socket("1000::1".parse().unwrap(), 80), "[1000::1]:80");
        assert_eq!(socket("10.0.0.1".parse().unwrap(), 80), "10.0.0.1:80");
        assert_eq!(socket("10.0.0.1".parse().unwrap(), 0), "10.0.0.1");
    }
}
