//! What this process takes of the machine, read from `/proc/self` at each scrape, under the names that every Prometheus
//! client gives it.

use std::{fmt, fs, io};

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// Reads at each scrape; what cannot be read is left out.
#[derive(Debug)]
pub(super) struct Process;

/// The figures, in the units of their metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    cpu_seconds: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
    threads: u64,
    start_time: f64,
    open_fds: usize,
    max_fds: u64,
}

impl Figures {
    fn read() -> io::Result<Self> {
        let unit = |variable, usual: f64| match sysconf(variable) {
            // Pages and ticks are small numbers.
            #[expect(clippy::cast_precision_loss, reason = "pages and ticks are small numbers")]
            Ok(Some(value)) => value as f64,
            _ => usual,
        };
        let stat = fs::read_to_string("/proc/self/stat")?;
        let boot = fs::read_to_string("/proc/stat")?;
        let (max_fds, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Self::parse(
            &stat,
            &boot,
            unit(SysconfVar::CLK_TCK, 100.0),
            sysconf(SysconfVar::PAGE_SIZE)
                .ok()
                .flatten()
                .and_then(|size| u64::try_from(size).ok())
                .unwrap_or(4096),
            // The one that lists them is among them.
            fs::read_dir("/proc/self/fd")?.count().saturating_sub(1),
            max_fds,
        )
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self/stat is not as in proc(5)"))
    }

    /// `stat` and `boot` are what `/proc/self/stat` and `/proc/stat` say.
    fn parse(
        stat: &str,
        boot: &str,
        ticks_a_second: f64,
        page_bytes: u64,
        open_fds: usize,
        max_fds: u64,
    ) -> Option<Self> {
        // The second field, the program's name in parentheses, may have any character in it. What follows counts from 3.
        let (_, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        #[expect(clippy::cast_precision_loss, reason = "exact for 285,000 years of ticks")]
        let seconds = |ticks: u64| ticks as f64 / ticks_a_second;
        let booted: f64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        Some(Self {
            cpu_seconds: seconds(field(14)? + field(15)?),
            resident_bytes: field(24)? * page_bytes,
            virtual_bytes: field(23)?,
            threads: field(20)?,
            start_time: booted + seconds(field(22)?),
            open_fds,
            max_fds,
        })
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Ok(figures) = Figures::read() else { return Ok(()) };
        let metric = encoder.encode_descriptor(
            "process_cpu_seconds",
            "CPU time that this process has taken, in user space and in the kernel",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(figures.cpu_seconds).encode(metric)?;
        let mut gauge = |name, help, value: f64| {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
        };
        #[expect(clippy::cast_precision_loss, reason = "what is beyond 2^53 bytes is not known to the byte")]
        let float = |value: u64| value as f64;
        gauge("process_resident_memory_bytes", "Memory that is resident", float(figures.resident_bytes))?;
        gauge("process_virtual_memory_bytes", "Memory that is mapped", float(figures.virtual_bytes))?;
        gauge("process_threads", "Threads of this process", float(figures.threads))?;
        gauge("process_open_fds", "File descriptors that are open", float(figures.open_fds as u64))?;
        gauge("process_max_fds", "File descriptors that may be open", float(figures.max_fds))?;
        gauge("process_start_time_seconds", "When this process was started, since 1970", figures.start_time)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn the_fields_are_those_of_proc_5_whatever_the_program_is_called() {
        let numbers: Vec<String> = (4..=52).map(|number| (number * 10).to_string()).collect();
        let stat = format!("7 (a ) b (c) S {}\n", numbers.join(" "));
        let boot = "cpu 1 2\nbtime 1000\nprocesses 9\n";
        let figures = Figures::parse(&stat, boot, 100.0, 4096, 11, 1024).unwrap();
        assert_eq!(
            figures,
            Figures {
                cpu_seconds: 2.9,
                resident_bytes: 240 * 4096,
                virtual_bytes: 230,
                threads: 200,
                start_time: 1002.2,
                open_fds: 11,
                max_fds: 1024,
            }
        );
    }

    #[test]
    fn what_is_cut_short_is_no_figure() {
        for (stat, boot) in [("", "btime 1"), ("7 (a) S 1 2 3", "btime 1"), ("7 (a) S 1", "")] {
            assert_eq!(Figures::parse(stat, boot, 100.0, 4096, 0, 0), None);
        }
    }

    #[test]
    fn this_process_has_figures_that_can_be_true() {
        let figures = Figures::read().unwrap();
        assert!(
            figures.resident_bytes > 1 << 20 && figures.virtual_bytes >= figures.resident_bytes,
            "{figures:?}"
        );
        assert!(figures.threads >= 2 && figures.open_fds >= 3, "{figures:?}");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((now - 3600.0..=now + 2.0).contains(&figures.start_time), "{figures:?}");
    }
}
