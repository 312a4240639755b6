//! [`CrashPlan`] as text, short enough for a command line, and back.
//!
//! Comma-separated survivors in the order in which they reached the medium: `4` is write 4 whole, `0-3` writes 0 to 3 whole, `5:first2`,
//! `5:last2` and `5:scattered77` parts of write 5; `none` if nothing survived.

use std::fmt;
use std::str::FromStr;

use super::crash::{CrashPlan, Sectors, Survivor};

/// Writes that a text may name: more than any run has in flight.
const WRITES_MAX: usize = 1 << 24;

impl fmt::Display for CrashPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.survivors.as_slice();
        if rest.is_empty() {
            return f.write_str("none");
        }
        let mut separator = "";
        while let Some(first) = rest.first() {
            f.write_str(separator)?;
            separator = ",";
            let run = (0..).zip(rest).take_while(|(index, survivor)| {
                survivor.sectors == Sectors::All && survivor.write == first.write.saturating_add(*index)
            });
            let length = run.count();
            match (length, first.sectors) {
                (2.., _) => write!(f, "{}-{}", first.write, first.write + length - 1)?,
                (_, Sectors::All) => write!(f, "{}", first.write)?,
                (_, Sectors::First(count)) => write!(f, "{}:first{count}", first.write)?,
                (_, Sectors::Last(count)) => write!(f, "{}:last{count}", first.write)?,
                (_, Sectors::Scattered(seed)) => write!(f, "{}:scattered{seed}", first.write)?,
            }
            rest = rest.get(length.max(1)..).unwrap_or_default();
        }
        Ok(())
    }
}

impl FromStr for CrashPlan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut survivors: Vec<Survivor> = Vec::new();
        if text == "none" {
            return Ok(Self { survivors });
        }
        for part in text.split(',') {
            let bad = || {
                format!("{part:?} is no part of a plan: write it as 4, 0-3, 5:first2, 5:last2, 5:scattered77 or none")
            };
            let number =
                |digits: &str| digits.parse::<usize>().ok().filter(|&write| write < WRITES_MAX).ok_or_else(bad);
            if let Some((write, sectors)) = part.split_once(':') {
                let write = number(write)?;
                let counted = |name: &str| sectors.strip_prefix(name).and_then(|count| count.parse::<u64>().ok());
                let sectors = counted("first")
                    .map(Sectors::First)
                    .or_else(|| counted("last").map(Sectors::Last))
                    .or_else(|| counted("scattered").map(Sectors::Scattered))
                    .ok_or_else(bad)?;
                survivors.push(Survivor { write, sectors });
                continue;
            }
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let whole = number(first)?..=number(last)?;
            if whole.is_empty() {
                return Err(bad());
            }
            survivors.extend(whole.map(|write| Survivor { write, sectors: Sectors::All }));
        }
        Ok(Self { survivors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_survives_its_text() {
        let whole = |write| Survivor { write, sectors: Sectors::All };
        let torn = |write, sectors| Survivor { write, sectors };
        for (plan, text) in [
            (vec![], "none"),
            (vec![whole(3)], "3"),
            (vec![whole(0), whole(1), whole(2), whole(4)], "0-2,4"),
            (vec![whole(2), whole(1), torn(0, Sectors::Last(3)), whole(7), whole(8)], "2,1,0:last3,7-8"),
            (
                vec![torn(0, Sectors::First(1)), torn(1, Sectors::Scattered(u64::MAX))],
                "0:first1,1:scattered18446744073709551615",
            ),
        ] {
            let plan = CrashPlan { survivors: plan };
            assert_eq!(plan.to_string(), text);
            assert_eq!(text.parse::<CrashPlan>().unwrap(), plan);
        }
        for text in ["", "x", "3-1", "1:", "1:first", "1:middle2", "0-99999999999", "1,,2", "-1"] {
            assert!(text.parse::<CrashPlan>().is_err(), "{text:?}");
        }
    }
}
