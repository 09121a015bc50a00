//! The dense formula in candle, as a worker of `../cpu/run.py`; `../cpu/protocol.py` has the
//! protocol.
//!
//! Sequences are padded by buckets of similar length. Queries meet the concatenated key heads, so
//! that both products are plain matrix products; each key head has its own columns of the values.

use candle_core::{D, DType, Device, IndexOp, Result, Tensor, Var, safetensors};
use candle_nn::ops;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::time::Instant;

const NAME: &str = "candle f32";
const EDGES: [usize; 11] = [16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024];

/// Sequences padded on the right to one length.
struct Bucket {
    /// `[B * T]`: the packed row of each place.
    token: Tensor,
    /// Packed rows of the tokens, and their places.
    rows: Tensor,
    places: Tensor,
    /// `[1, 1, T, T * H]`: 1 where the key is visible.
    visible: Tensor,
    count: usize,
    length: usize,
    /// The bucket is the whole batch, without padding.
    whole: bool,
}

struct Peer {
    q: Var,
    k: Var,
    v: Var,
    d_o: Tensor,
    liked: Tensor,
    buckets: Vec<Bucket>,
    last: Vec<Tensor>,
}

impl Peer {
    fn load(path: &str) -> Result<Self> {
        let device = Device::Cpu;
        let x: HashMap<String, Tensor> = safetensors::load(path, &device)?;
        let heads = x["q"].dim(1)?;
        let offsets: Vec<u32> = x["cu_seqlens"].to_dtype(DType::U32)?.to_vec1()?;
        let var = |name: &str| Var::from_tensor(&x[name]);
        Ok(Self {
            q: var("q")?,
            k: var("k")?,
            v: var("v")?,
            d_o: x["do"].clone(),
            liked: x["label"].to_dtype(DType::U8)?,
            buckets: buckets(&offsets, heads)?,
            last: Vec::new(),
        })
    }

    /// `q`: `[N, H, d]` -> `o`: `[N, H / 2, H, d]`. `train` avoids an operation without a gradient.
    fn operation(&self, [q, k, v]: [&Tensor; 3], train: bool) -> Result<Tensor> {
        let (tokens, heads, width) = q.dims3()?;
        let half = heads / 2;
        let liked = self.liked.reshape((tokens, 1, 1))?;
        let of_label = |x: &Tensor| {
            let side = |from: usize| x.i((.., from..from + half))?.contiguous();
            liked.broadcast_as((tokens, half, width))?.where_cond(&side(half)?, &side(0)?)
        };
        let own = of_label(q)?;
        // Values of the token's own heads; every key head has its own columns.
        let columns: Vec<Tensor> = (0..heads)
            .map(|head| {
                let serves = liked.eq((head >= half) as u8)?.broadcast_as((tokens, 1, width))?;
                let value = v.narrow(1, head, 1)?;
                let value = serves.where_cond(&value.contiguous()?, &value.zeros_like()?)?;
                let (before, after) = (head * width, (heads - 1 - head) * width);
                value.pad_with_zeros(2, before, after)
            })
            .collect::<Result<_>>()?;
        let wide = Tensor::cat(&columns, 1)?;
        let scale = (width as f64).powf(-0.5);
        let mut parts = Vec::new();
        for bucket in &self.buckets {
            let (count, length) = (bucket.count, bucket.length);
            let padded =
                |x: &Tensor| if bucket.whole { Ok(x.clone()) } else { x.index_select(&bucket.token, 0) };
            // [B, g, T, d] and [B, 1, T * H, ..]
            let query = padded(&own)?.reshape((count, length, half, width))?.transpose(1, 2)?.contiguous()?;
            let spread = |x: &Tensor, columns: usize| {
                padded(x)?
                    .reshape((count, 1, length * heads, columns))?
                    .broadcast_as((count, half, length * heads, columns))?
                    .contiguous()
            };
            let (key, value) = (spread(k, width)?, spread(&wide, heads * width)?);
            let scores = (query.matmul(&key.t()?)? * scale)?;
            let visible = bucket.visible.broadcast_as(scores.shape())?;
            let hidden = Tensor::new(f32::NEG_INFINITY, scores.device())?.broadcast_as(scores.shape())?;
            let scores = visible.where_cond(&scores, &hidden)?;
            let weights =
                if train { ops::softmax(&scores, D::Minus1)? } else { ops::softmax_last_dim(&scores)? };
            let out = weights.matmul(&value)?;
            parts.push(out.transpose(1, 2)?.contiguous()?.reshape((count * length, half, heads, width))?);
        }
        if self.buckets[0].whole {
            return Ok(parts.remove(0));
        }
        let mut o = Tensor::zeros((tokens, half, heads, width), DType::F32, q.device())?;
        for (bucket, part) in self.buckets.iter().zip(parts) {
            o = o.index_add(&bucket.rows, &part.index_select(&bucket.places, 0)?, 0)?;
        }
        Ok(o)
    }

    fn forward(&self) -> Result<Tensor> {
        let inputs = [&self.q, &self.k, &self.v].map(|x| x.as_tensor().detach());
        self.operation(inputs.each_ref(), false)
    }

    fn both(&mut self) -> Result<()> {
        let o = self.operation([&self.q, &self.k, &self.v].map(|x| x.as_tensor()), true)?;
        let gradients = (&o * &self.d_o)?.sum_all()?.backward()?;
        self.last = vec![o];
        for x in [&self.q, &self.k, &self.v] {
            let gradient =
                gradients.get(x).ok_or_else(|| candle_core::Error::msg("a gradient is missing"))?;
            self.last.push(gradient.clone());
        }
        Ok(())
    }

    fn save(&self, path: &str) -> Result<()> {
        let named = ["o", "dq", "dk", "dv"].into_iter().zip(&self.last);
        let named: HashMap<&str, Tensor> = named.map(|(name, x)| (name, x.detach())).collect();
        safetensors::save(&named, path)
    }
}

fn buckets(offsets: &[u32], heads: usize) -> Result<Vec<Bucket>> {
    let device = Device::Cpu;
    let lengths: Vec<usize> = offsets.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
    let longest = *lengths.iter().max().expect("a batch has a sequence");
    let uniform = lengths.iter().all(|&length| length == longest);
    let edges = EDGES.iter().copied().filter(|&edge| !uniform && edge < longest).chain([longest]);
    let (mut found, mut low) = (Vec::new(), 0);
    for edge in edges {
        let members: Vec<usize> =
            (0..lengths.len()).filter(|&i| low < lengths[i] && lengths[i] <= edge).collect();
        low = edge;
        if members.is_empty() {
            continue;
        }
        let (mut token, mut rows, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for &i in &members {
            for step in 0..edge {
                if step < lengths[i] {
                    rows.push(offsets[i] + step as u32);
                    places.push(token.len() as u32);
                    token.push(offsets[i] + step as u32);
                } else {
                    token.push(offsets[i]);
                }
            }
        }
        let visible: Vec<u8> = (0..edge)
            .flat_map(|query| (0..edge * heads).map(move |key| u8::from(key / heads <= query)))
            .collect();
        found.push(Bucket {
            token: Tensor::new(token, &device)?,
            rows: Tensor::new(rows, &device)?,
            places: Tensor::new(places, &device)?,
            visible: Tensor::from_vec(visible, (1, 1, edge, edge * heads), &device)?,
            count: members.len(),
            length: edge,
            whole: uniform,
        });
    }
    Ok(found)
}

/// The bytes of one score matrix of all sequences.
fn score_bytes(peer: &Peer, heads: usize) -> usize {
    peer.buckets.iter().map(|b| 4 * (heads / 2) * heads * b.count * b.length * b.length).sum()
}

/// Bytes of free memory; `None` where the system does not say.
fn available_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib << 10)
}

fn answer(peer: &mut Option<Peer>, request: &Value) -> Result<Value> {
    let text = |name: &str| request[name].as_str().unwrap_or_default();
    if text("do") == "load" {
        let loaded = Peer::load(text("path"))?;
        // Candle keeps every intermediate result until the backward pass ends.
        let needed = 10 * score_bytes(&loaded, loaded.q.dim(1)?);
        let available = available_bytes().unwrap_or(usize::MAX);
        if needed as f64 > 0.7 * available as f64 {
            let [needed, free] = [needed, available].map(|bytes| bytes as f64 / (1u64 << 30) as f64);
            let reason = format!("its score matrices need {needed:.1} GiB, and {free:.1} GiB are free");
            return Ok(json!({ "peers": [], "skipped": { NAME: reason } }));
        }
        *peer = Some(loaded);
        return Ok(json!({ "peers": [NAME], "skipped": {} }));
    }
    let Some(peer) = peer else { return Err(candle_core::Error::msg("nothing is loaded")) };
    let forward = text("pass") == "forward";
    let call = |peer: &mut Peer| if forward { peer.forward().map(drop) } else { peer.both() };
    let start = Instant::now();
    match text("do") {
        "check" => {
            peer.both()?;
            let seconds = start.elapsed().as_secs_f64();
            peer.save(text("path"))?;
            Ok(json!({ "seconds": seconds }))
        }
        "warm" => {
            call(peer)?;
            Ok(json!({ "seconds": start.elapsed().as_secs_f64() }))
        }
        _ => {
            let budget = request["seconds"].as_f64().unwrap_or(0.0);
            let mut times = Vec::new();
            while times.is_empty() || start.elapsed().as_secs_f64() < budget {
                let call_start = Instant::now();
                call(peer)?;
                times.push(call_start.elapsed().as_secs_f64());
            }
            Ok(json!({ "times": times }))
        }
    }
}

fn main() {
    let mut peer = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("requests are lines of text");
        let request: Value = serde_json::from_str(&line).expect("requests are JSON");
        let answer = answer(&mut peer, &request)
            .unwrap_or_else(|error| json!({ "error": error.to_string().lines().next().unwrap_or_default() }));
        println!("{answer}");
        std::io::stdout().flush().expect("the driver reads the answers");
    }
}
