//! `dfar-train score`: items ranked after a history, by their original ids.

use crate::device::{self, on_device};
use crate::{Output, open_run, set_threads};
use crate::{cli, report};
use clap::Args;
use dfar::evaluate::rank;
use dfar::model::Model;
use dfar::train::TrainError;
use dfar::train::config::DeviceChoice;
use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

#[derive(Args)]
pub struct Score {
    /// The run.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Events oldest first, as `item:1` (liked) or `item:0` (skipped), separated by commas; may be empty.
    #[arg(long, value_name = "ITEM:LABEL,..")]
    history: String,
    /// Items to rank, separated by commas [default: all items].
    #[arg(long, value_name = "ITEM,..", value_delimiter = ',')]
    candidates: Option<Vec<String>>,
    /// Print only the best so many [default: all of --candidates, or 10].
    #[arg(long, value_name = "N")]
    top: Option<usize>,
    /// Where to compute [default: the run's].
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// Threads; 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    output: Output,
}

#[derive(serde::Serialize)]
struct Ranked<'a> {
    rank: usize,
    item: &'a str,
    probability: f32,
    logit: f32,
}

pub fn score(args: Score) -> dfar::Result<()> {
    let (config, file) = open_run(&args.run)?;
    set_threads(args.threads);
    let index: HashMap<&str, u32> = file.items.iter().map(String::as_str).zip(0..).collect();
    let find = |item: &str, argument| {
        let item = item.trim();
        index.get(item).copied().ok_or_else(|| TrainError::UnknownItem { item: item.to_owned(), argument })
    };
    let (mut items, mut labels) = (Vec::new(), Vec::new());
    for event in args.history.split(',').filter(|event| !event.trim().is_empty()) {
        // Ids may hold colons; the label is what follows the last.
        let (item, label) = event.rsplit_once(':').ok_or_else(|| usage(event))?;
        labels.push(match label.trim() {
            "0" => 0,
            "1" => 1,
            _ => return Err(usage(event).into()),
        });
        items.push(find(item, "--history")?);
    }
    let candidates: Vec<u32> = match &args.candidates {
        Some(named) => named.iter().map(|item| find(item, "--candidates")).collect::<Result<_, _>>()?,
        None => (0..file.items.len() as u32).collect(),
    };
    let note = |line: &str| {
        if !args.output.quiet {
            // Nobody is left to tell when stderr is closed.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    };
    let chosen = device::open_for(&config, args.device, &note)?;
    let logits = on_device!(chosen, |device| {
        let model = Model::from_tensors(device, file.info.model, &file.parameters)?;
        rank(&model, &items, &labels, file.info.feedback, &candidates).map_err(TrainError::from)?
    });
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order.truncate(args.top.unwrap_or(if args.candidates.is_some() { usize::MAX } else { 10 }));
    let ranked: Vec<Ranked<'_>> = order
        .iter()
        .zip(1..)
        .map(|(&i, rank)| Ranked {
            rank,
            item: &file.items[candidates[i] as usize],
            probability: 1.0 / (1.0 + (-logits[i]).exp()),
            logit: logits[i],
        })
        .collect();
    cli::print(&match args.output.json {
        true => format!("{}\n", serde_json::to_string_pretty(&ranked).expect("plain numbers")),
        false => {
            let mut rows = vec![["rank", "item", "probability"].map(String::from).to_vec()];
            rows.extend(
                ranked
                    .iter()
                    .map(|r| vec![r.rank.to_string(), r.item.to_owned(), format!("{:.4}", r.probability)]),
            );
            report::table(&rows)
        }
    })
}

fn usage(event: &str) -> TrainError {
    TrainError::Usage {
        argument: "--history",
        reason: format!("`{event}` is not ITEM:1 (liked) or ITEM:0 (skipped)"),
    }
}
