//! Pictures of a report: bars, as SVG. One shape is all there is, so it is written down here.

use std::fmt::Write as _;

use proxier_tests::bench::{Report, figure::Figure, micro::Timing, statistics::Spread};

use super::table;

const WIDTH: f64 = 760.0;
/// Where bars begin: names are left of it.
const LEFT: f64 = 190.0;
/// What is kept for amounts at the right of the longest bar.
const RIGHT: f64 = 150.0;
const TOP: f64 = 64.0;
const ROW: f64 = 24.0;
const OURS: &str = "#1f6feb";
const OTHERS: &str = "#8b949e";

struct Bar {
    name: String,
    spread: Spread,
    /// What is written beside it.
    amount: String,
    ours: bool,
}

/// Ratios to the reference, with their quartiles; nothing if the figure was not taken.
pub(super) fn of_figure(report: &Report, figure: Figure) -> Option<String> {
    let bars: Vec<Bar> = report
        .rows
        .iter()
        .filter_map(|row| {
            let spread = table::ratio(report, row, figure)?;
            let amount = table::amount(figure, table::median(row, figure)?);
            let ours = row.arm.starts_with("proxier");
            Some(Bar {
                name: row.arm.clone(),
                spread,
                amount: format!("{:.2} ({amount})", spread.median),
                ours,
            })
        })
        .collect();
    let better = if figure.higher_is_better() { "more is better" } else { "less is better" };
    let subtitle =
        format!("as a ratio to route, median and quartiles of {} rounds; {better}", report.plan.rounds);
    (!bars.is_empty()).then(|| draw(figure.title(), &subtitle, &bars, Some(1.0)))
}

/// Nanoseconds of single programs.
pub(super) fn of_programs(timings: &[Timing]) -> String {
    let bars: Vec<Bar> = timings
        .iter()
        .map(|timing| Bar {
            name: timing.case.clone(),
            spread: Spread { median: timing.single, lower: timing.single, upper: timing.single },
            amount: format!("{:.0} ns", timing.single),
            ours: timing.case != "nothing" && timing.case != "one look-up",
        })
        .collect();
    let subtitle = "nanoseconds of a run by itself (BPF_PROG_TEST_RUN), median; less is better";
    draw("Single programs", subtitle, &bars, None)
}

fn draw(title: &str, subtitle: &str, bars: &[Bar], reference: Option<f64>) -> String {
    let height = TOP + ROW * bars.len() as f64 + 16.0;
    let longest =
        bars.iter().map(|bar| bar.spread.upper.max(bar.spread.median)).fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| LEFT + value / longest * (WIDTH - LEFT - RIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"17\">{}</text>\n<text x=\"16\" y=\"46\" fill=\"#57606a\">{}</text>\n",
        escape(title),
        escape(subtitle)
    );
    for (index, bar) in bars.iter().enumerate() {
        let Bar { name, spread: Spread { median, lower, upper }, amount, ours } = bar;
        let (top, middle) = (TOP + ROW * index as f64 + 4.0, TOP + ROW * index as f64 + ROW / 2.0);
        let color = if *ours { OURS } else { OTHERS };
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{color}\"/>\n\
             <path d=\"M{:.1} {middle:.1}H{:.1}\" stroke=\"black\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LEFT - 8.0,
            middle + 4.5,
            escape(name),
            x(*median) - LEFT,
            ROW - 8.0,
            x(*lower),
            x(*upper),
            x(*upper) + 8.0,
            middle + 4.5,
            escape(amount),
        );
    }
    if let Some(reference) = reference {
        let (x, bottom) = (x(reference), height - 12.0);
        let _ =
            writeln!(svg, "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#cf222e\" stroke-dasharray=\"4 3\"/>");
    }
    svg + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::table::tests::report;

    #[test]
    fn every_arm_has_a_bar_as_long_as_its_ratio() {
        let svg = of_figure(&report(), Figure::UdpPerSecond).unwrap();
        let width = |color: &str| -> f64 {
            let bar = svg.lines().find(|line| line.contains("<rect x") && line.contains(color)).unwrap();
            bar.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        assert_eq!(svg.matches("<rect x").count(), 2);
        assert!((width(OTHERS) - 420.0).abs() < 0.1, "route is the longest: {svg}");
        assert!(svg.contains("width=\"378.0\""), "nine tenths of it: {svg}");
        assert!(svg.contains("0.90 (900.0k)") && svg.contains("more is better"), "{svg}");
    }

    #[test]
    fn less_is_better_where_it_is() {
        assert!(of_figure(&report(), Figure::RoundTripP50).unwrap().contains("less is better"));
    }

    #[test]
    fn without_figures_there_is_no_picture() {
        assert!(of_figure(&report(), Figure::TcpGbps).is_none());
    }

    #[test]
    fn words_cannot_break_the_picture() {
        let timing = Timing { case: "a < b & c".to_owned(), single: 5.0, repeated: None, lookups: None };
        let svg = of_programs(&[timing]);
        assert!(svg.contains("a &lt; b &amp; c") && svg.ends_with("</svg>\n"), "{svg}");
    }
}
