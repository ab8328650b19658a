//! Plots as SVG files: a line for each table that shows growth, bars for one that compares with KVM.

#![allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Measurement;

const WIDTH: f64 = 720.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 40.0;
const TOP: f64 = 50.0;
const ROW: f64 = 44.0;
const PLOT_HEIGHT: f64 = 300.0;
const BAR: f64 = 12.0;
const MEASURED: &str = "#1f6feb";
const KVM: &str = "#b0b7c0";
const TARGET: &str = "#d1242f";

/// Writes a file for each table that can be plotted.
pub(super) fn write(measured: &[Measurement], directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    for table in measured.chunk_by(|a, b| a.table == b.table) {
        let svg = if table.iter().all(|row| row.at.is_some()) {
            line(table)
        } else if table.iter().any(|row| row.kvm.is_some()) {
            bars(table)
        } else {
            continue;
        };
        let words = table[0]
            .table
            .split(|letter: char| !letter.is_ascii_alphanumeric());
        let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
        let path = directory.join(words.join("-") + ".svg");
        fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// A drawing that is being made.
struct Drawing(String);

impl Drawing {
    fn new(title: &str, height: f64) -> Self {
        let mut drawing = Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        ));
        drawing.text(LEFT, 24.0, "start", &format!("{title} (fewer is better)"));
        drawing
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        self.add(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    fn bar(&mut self, y: f64, width: f64, color: &str) {
        self.add(&format!(
            "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{color}\"/>"
        ));
    }

    fn stroke(&mut self, points: &[(f64, f64)], color: &str) {
        let mut path = String::new();
        for (x, y) in points {
            let _ = write!(path, "{x:.1},{y:.1} ");
        }
        self.add(&format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>",
            path.trim_end()
        ));
    }

    fn add(&mut self, element: &str) {
        self.0.push_str(element);
        self.0.push('\n');
    }

    fn finish(mut self) -> String {
        self.add("</svg>");
        self.0
    }
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(1.0, f64::max)
}

/// Values over what they grow with, at equal distances, for these double from one to the next.
fn line(table: &[Measurement]) -> String {
    let mut drawing = Drawing::new(
        &format!("{}: {}", table[0].table, table[0].unit),
        TOP + PLOT_HEIGHT + 50.0,
    );
    let top = largest(table.iter().map(|row| row.value)) * 1.1;
    let bottom = TOP + PLOT_HEIGHT;
    let height = |value: f64| bottom - PLOT_HEIGHT * value / top;
    for part in 0..=4 {
        let value = top * f64::from(part) / 4.0;
        drawing.text(
            LEFT - 8.0,
            height(value) + 4.0,
            "end",
            &format!("{value:.0}"),
        );
        drawing.stroke(
            &[(LEFT, height(value)), (WIDTH - RIGHT, height(value))],
            "#e6e8eb",
        );
    }
    let step = (WIDTH - LEFT - RIGHT) / (table.len().max(2) - 1) as f64;
    let points: Vec<_> = (0..)
        .zip(table)
        .map(|(place, row)| (LEFT + step * f64::from(place), height(row.value)))
        .collect();
    for ((x, y), row) in points.iter().zip(table) {
        let at = row.at.unwrap_or_default();
        drawing.text(*x, bottom + 20.0, "middle", &format!("{at}"));
        drawing.text(*x, y - 8.0, "middle", &format!("{:.0}", row.value));
    }
    drawing.stroke(&points, MEASURED);
    drawing.finish()
}

/// A bar for each value, with KVM's below and the target as a line across.
fn bars(table: &[Measurement]) -> String {
    let height = TOP + ROW * table.len() as f64 + 20.0;
    let mut drawing = Drawing::new(&table[0].table, height);
    drawing.text(
        LEFT,
        42.0,
        "start",
        "blue: Umbra, gray: KVM with shadow paging, red: target",
    );
    let longest = largest(
        table
            .iter()
            .map(|row| row.value.max(row.kvm.unwrap_or(0.0))),
    );
    let width = |value: f64| (WIDTH - LEFT - RIGHT - 40.0) * value / longest;
    for (place, row) in (0..).zip(table) {
        let y = TOP + ROW * f64::from(place) + 4.0;
        drawing.text(LEFT - 8.0, y + 14.0, "end", &row.name);
        drawing.bar(y, width(row.value), MEASURED);
        let value = format!("{:.0}", row.value);
        drawing.text(LEFT + width(row.value) + 5.0, y + 10.0, "start", &value);
        if let Some(kvm) = row.kvm {
            drawing.bar(y + BAR + 2.0, width(kvm), KVM);
            let value = format!("{kvm:.0}");
            drawing.text(LEFT + width(kvm) + 5.0, y + BAR + 12.0, "start", &value);
        }
        if let Some(target) = row.target {
            let x = LEFT + width(target);
            drawing.stroke(&[(x, y - 3.0), (x, y + 2.0 * BAR + 5.0)], TARGET);
        }
    }
    drawing.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(value: f64, at: Option<f64>, kvm: Option<f64>) -> Measurement {
        Measurement {
            kvm,
            at,
            ..Measurement::new("growth, by <size>", "name", value, "instructions")
        }
    }

    #[test]
    fn each_kind_of_table_has_its_plot() {
        let directory = std::env::temp_dir().join(format!("umbra-charts-{}", std::process::id()));
        let growth = [row(10.0, Some(1.0), None), row(20.0, Some(2.0), None)];
        write(&growth, &directory).unwrap();
        let svg = fs::read_to_string(directory.join("growth-by-size.svg")).unwrap();
        assert!(svg.contains("polyline") && svg.contains("&lt;size") && svg.ends_with("</svg>\n"));
        write(&[row(10.0, None, Some(30.0))], &directory).unwrap();
        let svg = fs::read_to_string(directory.join("growth-by-size.svg")).unwrap();
        assert_eq!(svg.matches(KVM).count(), 1);
        fs::remove_dir_all(&directory).unwrap();
        write(&[row(10.0, None, None)], &directory).unwrap();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        fs::remove_dir_all(&directory).unwrap();
    }
}
