//! A report as tables: for a screen, and for a page.

use comfy_table::{CellAlignment, Table, TableStyle, presets};
use proxier_tests::bench::{Report, Row, figure::Figure, statistics::Spread};

/// All tables, as a person in front of a terminal wants them.
pub(super) fn on_screen(report: &Report) -> String {
    render(report, presets::UTF8_FULL_CONDENSED)
}

/// The same for `docs/BENCHMARKS.md`.
pub(super) fn as_markdown(report: &Report) -> String {
    render(report, presets::ASCII_MARKDOWN)
}

fn render(report: &Report, style: TableStyle) -> String {
    let mut text = format!("{}\n", arms(report, style));
    let costs: Vec<[String; 5]> = costs(report);
    if !costs.is_empty() {
        text += &format!(
            "\n{}\n",
            table(style, &["arm", "traffic", "program", "runs", "ns a run"], &[3, 4], costs)
        );
    }
    if !report.programs.is_empty() {
        let rows = report.programs.iter().map(|timing| {
            let or_none = |value: Option<String>| value.unwrap_or_default();
            [
                timing.case.clone(),
                or_none(timing.lookups.map(|lookups| lookups.to_string())),
                format!("{:.0}", timing.single),
                or_none(timing.repeated.map(|repeated| format!("{repeated:.1}"))),
            ]
        });
        let header = ["packet", "look-ups", "ns, by itself", "ns, repeated"];
        text += &format!("\n{}\n", table(style, &header, &[1, 2, 3], rows));
    }
    text
}

fn arms(report: &Report, style: TableStyle) -> Table {
    let mut header = vec!["arm"];
    header.extend(Figure::COMPARED.map(Figure::title));
    let rows = report.rows.iter().map(|row| {
        let mut cells = vec![row.arm.clone()];
        cells.extend(Figure::COMPARED.map(|figure| cell(report, row, figure)));
        cells
    });
    let columns: Vec<usize> = (1..header.len()).collect();
    table(style, &header, &columns, rows)
}

fn table<R: IntoIterator<Item = String>>(
    style: TableStyle,
    header: &[&str],
    right: &[usize],
    rows: impl IntoIterator<Item = R>,
) -> Table {
    let mut table = Table::new();
    table.load_style(style).set_header(header.to_vec());
    for row in rows {
        table.add_row(row.into_iter().collect::<Vec<_>>());
    }
    for column in right {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The median, and the ratio to the reference with its quartiles.
fn cell(report: &Report, row: &Row, figure: Figure) -> String {
    let Some(median) = median(row, figure) else { return String::new() };
    let amount = amount(figure, median);
    match ratio(report, row, figure) {
        Some(Spread { median, lower, upper }) => format!("{amount}  {median:.2} ({lower:.2}-{upper:.2})"),
        None => amount,
    }
}

/// In the middle of all rounds.
pub(super) fn median(row: &Row, figure: Figure) -> Option<f64> {
    Some(Spread::of(row.figures.get(&figure)?)?.median)
}

/// To the reference, round by round.
pub(super) fn ratio(report: &Report, row: &Row, figure: Figure) -> Option<Spread> {
    Spread::of_ratios(row.figures.get(&figure)?, report.reference(figure)?)
}

/// As many digits as mean something.
pub(super) fn amount(figure: Figure, value: f64) -> String {
    match figure {
        Figure::UdpPerSecond | Figure::ConnectionsPerSecond if value >= 1e6 => format!("{:.2}M", value / 1e6),
        Figure::UdpPerSecond | Figure::ConnectionsPerSecond => format!("{:.1}k", value / 1e3),
        _ => format!("{value:.1}"),
    }
}

fn costs(report: &Report) -> Vec<[String; 5]> {
    let of_row = |row: &Row| {
        row.costs
            .iter()
            .map(|cost| {
                [
                    row.arm.clone(),
                    cost.traffic.clone(),
                    cost.program.clone(),
                    cost.runs.to_string(),
                    format!("{:.0}", cost.nanoseconds),
                ]
            })
            .collect::<Vec<_>>()
    };
    report.rows.iter().flat_map(of_row).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use proxier_tests::bench::{Machine, Plan, cost::Cost, load::Cpus, micro::Timing};

    use super::*;

    /// Three rounds of two arms, the second of which is a tenth slower.
    pub(in crate::bench) fn report() -> Report {
        let row = |arm: &str, factor: f64| Row {
            arm: arm.to_owned(),
            figures: BTreeMap::from([
                (Figure::UdpPerSecond, vec![1.0e6 * factor, 0.5e6 * factor, 1.2e6 * factor]),
                (Figure::RoundTripP50, vec![10.0 / factor, 20.0 / factor, 10.0 / factor]),
                (Figure::UdpLostPercent, vec![0.0, 0.0, 0.0]),
            ]),
            costs: Vec::new(),
        };
        let mut rows = vec![row("route", 1.0), row("nft", 0.9)];
        rows[1].costs.push(Cost {
            traffic: "datagrams".to_owned(),
            program: "proxier_request".to_owned(),
            runs: 1234,
            nanoseconds: 210.4,
        });
        Report {
            machine: Machine {
                kernel: "6.12.1".to_owned(),
                processor: "Test & <Sons>".to_owned(),
                cpus: 2,
                pinned: Cpus { client: 0, pod: 1 },
                busy_percent: 0.5,
            },
            plan: Plan::quick(),
            left_out: Vec::new(),
            rows,
            programs: vec![Timing {
                case: "miss".to_owned(),
                single: 80.0,
                repeated: Some(31.25),
                lookups: Some(1),
            }],
            seconds: 7,
        }
    }

    #[test]
    fn a_row_has_medians_and_ratios_with_their_spread() {
        let text = as_markdown(&report());
        let row = text.lines().find(|line| line.contains("| nft")).unwrap();
        assert!(row.contains("900.0k  0.90 (0.90-0.90)"), "{row}");
        assert!(row.contains("11.1  1.11 (1.11-1.11)"), "{row}");
        let route = text.lines().find(|line| line.contains("| route")).unwrap();
        assert!(route.contains("1.00M  1.00 (1.00-1.00)"), "{route}");
    }

    #[test]
    fn programs_have_tables_of_their_own() {
        for text in [as_markdown(&report()), on_screen(&report())] {
            for word in ["proxier_request", "210", "1234", "miss", "31.2", "look-ups"] {
                assert!(text.contains(word), "{word}: {text}");
            }
        }
    }

    #[test]
    fn a_figure_that_was_not_taken_is_an_empty_cell() {
        let mut report = report();
        report.rows[1].figures.clear();
        assert_eq!(cell(&report, &report.rows[1], Figure::UdpPerSecond), "");
        report.rows.remove(0);
        assert_eq!(ratio(&report, &report.rows[0], Figure::UdpPerSecond), None);
    }
}
