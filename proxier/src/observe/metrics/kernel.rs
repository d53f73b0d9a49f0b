//! What the kernel's maps say, read at each scrape: packets dropped, what else is counted, and how full the maps are.

use std::{
    fmt::{self, Debug},
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use tokio::time::Instant;

use crate::sink::bpf::inspect::{self, DropRow, FillRow, StatisticRow};

/// The entries of all maps are counted at most this often, however often there is a scrape: with half a million flows and
/// sessions that is some 0.3 seconds of one CPU (a debug build; 3 milliseconds if the maps are empty).
pub const COUNTED_EVERY: Duration = Duration::from_secs(30);

/// Where the figures come from.
pub trait Kernel: Debug + Send + Sync + 'static {
    /// Packets dropped, by reason and hook.
    ///
    /// # Errors
    ///
    /// The maps cannot be read.
    fn drops(&self) -> anyhow::Result<Vec<DropRow>>;

    /// What else is counted.
    ///
    /// # Errors
    ///
    /// As [`Kernel::drops`].
    fn statistics(&self) -> anyhow::Result<Vec<StatisticRow>>;

    /// How full the maps are. Not cheap.
    ///
    /// # Errors
    ///
    /// As [`Kernel::drops`].
    fn fill(&self) -> anyhow::Result<Vec<FillRow>>;
}

/// The maps that are pinned below a path.
#[derive(Clone, Debug)]
pub struct PinnedMaps {
    /// As `--pin-path` says.
    pub pin_path: PathBuf,
}

impl Kernel for PinnedMaps {
    fn drops(&self) -> anyhow::Result<Vec<DropRow>> {
        inspect::drops(&self.pin_path)
    }

    fn statistics(&self) -> anyhow::Result<Vec<StatisticRow>> {
        inspect::statistics(&self.pin_path)
    }

    fn fill(&self) -> anyhow::Result<Vec<FillRow>> {
        inspect::fill(&self.pin_path)
    }
}

/// Reads a [`Kernel`] at each scrape. What cannot be read is left out rather than given as 0: `rate()` would take that for
/// a restart.
#[derive(Debug)]
pub(super) struct KernelCollector {
    kernel: Box<dyn Kernel>,
    fill: Mutex<Option<(Instant, Vec<FillRow>)>>,
    failing: AtomicBool,
}

impl KernelCollector {
    pub(super) fn new(kernel: Box<dyn Kernel>) -> Self {
        Self { kernel, fill: Mutex::default(), failing: AtomicBool::new(false) }
    }

    fn fill(&self) -> anyhow::Result<Vec<FillRow>> {
        let mut known = self.fill.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((counted, rows)) = &*known
            && counted.elapsed() < COUNTED_EVERY
        {
            return Ok(rows.clone());
        }
        let rows = self.kernel.fill()?;
        *known = Some((Instant::now(), rows.clone()));
        Ok(rows)
    }

    fn read(&self) -> anyhow::Result<(Vec<DropRow>, Vec<StatisticRow>, Vec<FillRow>)> {
        Ok((self.kernel.drops()?, self.kernel.statistics()?, self.fill()?))
    }
}

impl Collector for KernelCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let read = self.read();
        if let Err(error) = &read {
            if !self.failing.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "the kernel's figures are missing from the metrics, tried again at each scrape: {error:#}"
                );
            }
        } else {
            self.failing.store(false, Ordering::Relaxed);
        }
        let readable = encoder.encode_descriptor(
            "kernel_maps_readable",
            "Whether the kernel's maps could be read for this scrape; without, the metrics made of them are missing",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(u32::from(read.is_ok())).encode(readable)?;
        let Ok((drops, statistics, fill)) = read else { return Ok(()) };

        let mut metric = encoder.encode_descriptor(
            "dropped_packets",
            "Packets dropped by the kernel programs, since the maps were made",
            None,
            MetricType::Counter,
        )?;
        for row in drops {
            let labels = [("reason", row.reason), ("hook", row.hook)];
            ConstCounter::new(row.packets).encode(metric.encode_family(&labels)?)?;
        }
        let mut metric = encoder.encode_descriptor(
            "statistics",
            "What the kernel programs count beside packets dropped, since the maps were made",
            None,
            MetricType::Counter,
        )?;
        for row in statistics {
            ConstCounter::new(row.count).encode(metric.encode_family(&[("statistic", row.statistic)])?)?;
        }
        let mut metric = encoder.encode_descriptor(
            "map_entries",
            "Entries of a kernel map, counted every 30 seconds at most",
            None,
            MetricType::Gauge,
        )?;
        for row in &fill {
            ConstGauge::new(row.entries).encode(metric.encode_family(&[("map", row.map)])?)?;
        }
        let mut metric = encoder.encode_descriptor(
            "map_max_entries",
            "Entries that a kernel map has room for",
            None,
            MetricType::Gauge,
        )?;
        for row in &fill {
            ConstGauge::new(row.max_entries).encode(metric.encode_family(&[("map", row.map)])?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use prometheus_client::{encoding::text, registry::Registry};
    use tokio::time::advance;

    use super::*;

    /// Counts how often it is asked for the fill, and fails when told.
    #[derive(Clone, Debug, Default)]
    struct Double(Arc<DoubleState>);

    #[derive(Debug, Default)]
    struct DoubleState {
        counted: AtomicU64,
        broken: AtomicBool,
    }

    impl Kernel for Double {
        fn drops(&self) -> anyhow::Result<Vec<DropRow>> {
            anyhow::ensure!(!self.0.broken.load(Ordering::Relaxed), "no maps");
            let row = |reason, packets| DropRow { reason, hook: "uplink-ingress", packets };
            Ok(vec![row("no-backend", 17), row("no-route", 0)])
        }

        fn statistics(&self) -> anyhow::Result<Vec<StatisticRow>> {
            Ok(vec![StatisticRow { statistic: "flow-inserted", count: 300_000 }])
        }

        fn fill(&self) -> anyhow::Result<Vec<FillRow>> {
            let entries = self.0.counted.fetch_add(1, Ordering::Relaxed) + 1;
            Ok(vec![FillRow { map: "flows", entries, max_entries: 262_144 }])
        }
    }

    fn scrape(registry: &Registry) -> String {
        let mut text = String::new();
        text::encode(&mut text, registry).unwrap();
        text
    }

    fn registry(double: &Double) -> Registry {
        let mut registry = Registry::with_prefix("proxier");
        registry.register_collector(Box::new(KernelCollector::new(Box::new(double.clone()))));
        registry
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_maps_say_is_told_with_zeros() {
        let text = scrape(&registry(&Double::default()));
        for line in [
            "proxier_kernel_maps_readable 1",
            "proxier_dropped_packets_total{reason=\"no-backend\",hook=\"uplink-ingress\"} 17",
            "proxier_dropped_packets_total{reason=\"no-route\",hook=\"uplink-ingress\"} 0",
            "proxier_statistics_total{statistic=\"flow-inserted\"} 300000",
            "proxier_map_entries{map=\"flows\"} 1",
            "proxier_map_max_entries{map=\"flows\"} 262144",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn entries_are_counted_every_thirty_seconds_however_often_they_are_asked_for() {
        let double = Double::default();
        let registry = registry(&double);
        for _ in 0..60 {
            scrape(&registry);
            advance(Duration::from_secs(1)).await;
        }
        assert_eq!(double.0.counted.load(Ordering::Relaxed), 2);
        assert!(scrape(&registry).contains("proxier_map_entries{map=\"flows\"} 3"));
    }

    #[tokio::test(start_paused = true)]
    async fn maps_that_cannot_be_read_are_left_out_and_not_said_to_be_zero() {
        let double = Double::default();
        let registry = registry(&double);
        double.0.broken.store(true, Ordering::Relaxed);
        let text = scrape(&registry);
        assert!(text.contains("proxier_kernel_maps_readable 0\n"), "{text}");
        assert!(!text.contains("dropped_packets") && !text.contains("map_entries"), "{text}");
        double.0.broken.store(false, Ordering::Relaxed);
        assert!(scrape(&registry).contains("proxier_kernel_maps_readable 1\n"));
    }
}
