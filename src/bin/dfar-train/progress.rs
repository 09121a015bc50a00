//! Progress on stderr: bars on a terminal, else one line per epoch.

use crate::cli::note;
use crate::output::Output;
use crate::report::count;
use dfar::data::Part;
use dfar::train::Event;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

/// Reports the progress of a run, and stops the run when `stop` is set.
#[derive(Clone)]
pub struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
    stop: &'static AtomicBool,
}

impl Progress {
    pub fn new(output: Output, stop: &'static AtomicBool) -> Self {
        let bar = || ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(10));
        Self { bar: output.has_bars().then(bar), quiet: output.quiet, stop }
    }

    /// Prints a line of the log.
    pub fn line(&self, text: &str) {
        if !self.quiet {
            self.always(text);
        }
    }

    /// Prints a line even with `--quiet`.
    pub fn always(&self, text: &str) {
        let print = || note(text);
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Removes the bar.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    pub fn observe(&self, event: Event<'_>) -> ControlFlow<()> {
        match event {
            Event::Epoch { epoch, epochs, size, topped_up, done } => {
                if topped_up {
                    self.line(&format!(
                        "epoch {epoch}: --sample-rate is too small for this data set and drew no target; training on one"
                    ));
                }
                if epoch == 1 && done == 0 {
                    self.line(&format!(
                        "{} training targets per epoch: {} shared passes, {} windows, {} tokens, {} instances, {} batches",
                        count(size.targets),
                        count(size.shared_passes),
                        count(size.windows),
                        count(size.tokens),
                        count(size.rows),
                        count(size.batches)
                    ));
                }
                self.begin(&format!("epoch {epoch}/{epochs}"), size.batches, done);
            }
            Event::Step { done, sums, .. } => {
                if let Some(bar) = &self.bar {
                    let rate = (sums.rows as f64 / sums.time.seconds).round() as usize;
                    bar.set_message(format!(
                        "loss {:.4}, {} instances/s, device busy {:.0} %",
                        sums.loss / sums.rows as f64,
                        count(rate),
                        100.0 * sums.time.utilization()
                    ));
                    bar.set_position(done as u64);
                }
            }
            Event::Scored { part, done, groups } => {
                if let Some(bar) = &self.bar {
                    let name = if part == Part::Valid { "validation" } else { "test" };
                    if bar.prefix() != name || bar.position() > done as u64 {
                        self.begin(name, groups, 0);
                        bar.set_message("groups");
                    }
                    bar.set_position(done as u64);
                }
            }
            Event::EpochEnd { record, best } => {
                let auc = record.valid_auc.map_or_else(|| "-".to_owned(), |auc| format!("{auc:.4}"));
                self.line(&format!(
                    "epoch {}: loss {:.4} (bce {:.4}, ibl {:.4}, idl {:.4}), validation AUC {auc}{}, {} instances/s, device busy {:.0} %, {:.1} s",
                    record.epoch,
                    record.loss,
                    record.bce,
                    record.ibl,
                    record.idl,
                    if best { " (best)" } else { "" },
                    count(record.instances_per_second.round() as usize),
                    100.0 * record.utilization.unwrap_or(0.0),
                    record.train_seconds + record.valid_seconds
                ));
            }
            _ => {}
        }
        match self.stop.load(Ordering::SeqCst) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn begin(&self, name: &str, length: usize, done: usize) {
        if let Some(bar) = &self.bar {
            let style = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {msg}, {eta} left");
            bar.set_style(style.expect("the template is well-formed").progress_chars("=> "));
            bar.reset();
            bar.set_length(length as u64);
            bar.set_position(done as u64);
            bar.reset_eta();
            bar.set_prefix(name.to_owned());
            bar.set_message("");
        }
    }
}
