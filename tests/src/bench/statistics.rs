//! Medians, quartiles, and ratios of two arms, taken round by round: two figures of one round have met the same machine.

use serde::{Deserialize, Serialize};

/// The middle of several numbers, and how far they spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// As many are above as below.
    pub median: f64,
    /// A quarter is below.
    pub lower: f64,
    /// A quarter is above.
    pub upper: f64,
}

impl Spread {
    /// Of these numbers; none of nothing.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            median: quantile(&sorted, 0.5)?,
            lower: quantile(&sorted, 0.25)?,
            upper: quantile(&sorted, 0.75)?,
        })
    }

    /// Of `values` divided by those of the same rounds in `reference`.
    #[must_use]
    pub fn of_ratios(values: &[f64], reference: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = values.iter().zip(reference).map(|(value, by)| value / by).collect();
        Self::of(&ratios)
    }
}

/// The value at this share of the way through `sorted`, between two of them in proportion.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let position = share * last as f64;
    // Of small numbers that are not negative, nothing is lost.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the length")]
    let below = position.floor() as usize;
    let above = (below + 1).min(last);
    Some(sorted[below] + (sorted[above] - sorted[below]) * (position - position.floor()))
}

/// The value that this share in percent of all is not above: of many samples, so without anything in between.
#[must_use]
pub fn percentile(sorted: &[u32], percent: usize) -> Option<u32> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_outlier_moves_neither_median_nor_quartiles_far() {
        let spread = Spread::of(&[10.0, 11.0, 12.0, 13.0, 1000.0]).unwrap();
        assert_eq!(spread, Spread { median: 12.0, lower: 11.0, upper: 13.0 });
    }

    #[test]
    fn quartiles_of_an_even_number_lie_between_two() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { median: 2.5, lower: 1.75, upper: 3.25 });
    }

    #[test]
    fn a_single_number_has_no_spread_and_none_has_no_median() {
        assert_eq!(Spread::of(&[7.0]), Some(Spread { median: 7.0, lower: 7.0, upper: 7.0 }));
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        // A machine that halves its speed after the first round changes no ratio.
        let ratio = Spread::of_ratios(&[120.0, 60.0, 61.0], &[100.0, 50.0, 50.0]).unwrap();
        assert_eq!(ratio.median, 1.2);
        assert!(ratio.upper < 1.22, "{ratio:?}");
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let sorted: Vec<u32> = (1..=200).collect();
        assert_eq!(percentile(&sorted, 50), Some(100));
        assert_eq!(percentile(&sorted, 99), Some(198));
        assert_eq!(percentile(&[5], 99), Some(5));
    }
}
