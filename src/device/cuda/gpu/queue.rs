//! Work that is about to be launched. Independent operations are recorded first and then share
//! launches: products and sums of partial results in any number, other kernels in pairs.

use super::products::{self, MOST_PRODUCTS, MOST_SUMS, Product, Sum};
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Kernel, Launch, Pointer};
use crate::device::cuda::runtime::{Gemm, Runtime};
use std::collections::VecDeque;

/// A request to the runtime.
pub(super) enum Request {
    /// A launch of its own.
    Launch(Kernel, Launch, Vec<u8>),
    /// A kernel for one or two problems.
    Both(Kernel, Vec<(Launch, Vec<u8>)>),
    Products(Vec<Product>),
    Sums(Vec<Sum>),
    Zero(Pointer, usize),
    Gemm(Gemm),
}

/// Requests of one or two independent sequences of operations.
#[derive(Default)]
pub(super) struct Recording {
    lanes: [VecDeque<Request>; 2],
    /// The lane that requests go to.
    pub lane: usize,
    /// Start of the independent operations in progress in the lane.
    group: Option<usize>,
}

impl Recording {
    pub fn push(&mut self, request: Request) {
        self.lanes[self.lane].push_back(request);
    }

    /// Whether independent operations may begin here: they do not nest.
    pub fn begin_group(&mut self) -> bool {
        let begins = self.group.is_none();
        if begins {
            self.group = Some(self.lanes[self.lane].len());
        }
        begins
    }

    /// Merges products, and pairs of other kernels, that follow on each other since
    /// [`Recording::begin_group`].
    pub fn end_group(&mut self) {
        let Some(start) = self.group.take() else { return };
        let lane = &mut self.lanes[self.lane];
        let rest = lane.split_off(start);
        for request in rest {
            let merges = matches!(request, Request::Products(_) | Request::Both(..));
            let follows = merges && lane.len() > start;
            match if follows { lane.pop_back() } else { None } {
                None => lane.push_back(request),
                Some(last) => lane.extend(merge(last, request)),
            }
        }
    }

    /// All requests, with those of the same kind in both lanes merged.
    pub fn merged(self) -> Vec<Request> {
        let [mut first, mut second] = self.lanes;
        let mut all = Vec::with_capacity(first.len() + second.len());
        while let (Some(a), Some(b)) = (first.front(), second.front()) {
            if alike(a, b) {
                let pair = first.pop_front().zip(second.pop_front());
                all.extend(pair.into_iter().flat_map(|(a, b)| merge(a, b)));
            } else if second.iter().any(|later| alike(a, later)) && !first.iter().any(|later| alike(b, later))
            {
                all.extend(second.pop_front());
            } else {
                all.extend(first.pop_front());
            }
        }
        all.extend(first);
        all.extend(second);
        all
    }
}

/// Whether two requests are of the same kind.
fn alike(a: &Request, b: &Request) -> bool {
    match (a, b) {
        (Request::Both(a, _), Request::Both(b, _)) => a == b,
        (Request::Launch(a, ..), Request::Launch(b, ..)) => a == b,
        _ => std::mem::discriminant(a) == std::mem::discriminant(b),
    }
}

/// Two requests, as one if the kernel can. The second may add to what the first writes.
fn merge(a: Request, b: Request) -> Vec<Request> {
    match (a, b) {
        (Request::Products(mut a), Request::Products(b)) => {
            let mut later: Vec<Product> = vec![];
            for product in b {
                let same = |other: &Product| other.c() == product.c();
                match a.iter_mut().find(|other| same(other)) {
                    None => a.push(product),
                    Some(other) => match other.with(&product) {
                        Some(both) if !later.iter().any(same) => *other = both,
                        _ => later.push(product),
                    },
                }
            }
            [a, later].into_iter().filter(|list| !list.is_empty()).map(Request::Products).collect()
        }
        (Request::Sums(a), Request::Sums(b)) => vec![Request::Sums([a, b].concat())],
        (Request::Both(kernel, mut a), Request::Both(other, b)) if kernel == other && fit(&a, &b) => {
            a.extend(b);
            vec![Request::Both(kernel, a)]
        }
        (a, b) => vec![a, b],
    }
}

/// Whether two problems have the blocks of one launch.
fn fit(a: &[(Launch, Vec<u8>)], b: &[(Launch, Vec<u8>)]) -> bool {
    match (a, b) {
        ([(a, _)], [(b, _)]) => a.grid[1] == b.grid[1] && a.threads == b.threads,
        _ => false,
    }
}

/// Hands a request to the runtime.
///
/// # Safety
/// As the methods of [`Runtime`] that it calls.
pub(super) unsafe fn issue<R: Runtime>(runtime: &R, request: Request) -> Result<(), CudaError> {
    // SAFETY: guaranteed by the caller.
    unsafe {
        match request {
            Request::Launch(kernel, launch, params) => runtime.launch(kernel, launch, &params),
            Request::Both(kernel, problems) => {
                let (launch, params) = both(&problems);
                runtime.launch(kernel, launch, &params)
            }
            Request::Products(problems) => problems
                .chunks(MOST_PRODUCTS)
                .filter_map(products::products)
                .try_for_each(|(launch, params)| {
                    runtime.launch(products::PRODUCTS, launch, bytemuck::bytes_of(&params))
                }),
            Request::Sums(sums) => {
                sums.chunks(MOST_SUMS).filter_map(products::sums).try_for_each(|(launch, params)| {
                    runtime.launch(products::SUM, launch, bytemuck::bytes_of(&params))
                })
            }
            Request::Zero(at, bytes) => runtime.zero(at, bytes),
            Request::Gemm(gemm) => runtime.gemm(&gemm),
        }
    }
}

/// The launch of one or two problems and its argument: `Both` of `primitives.cuh`.
fn both(problems: &[(Launch, Vec<u8>)]) -> (Launch, Vec<u8>) {
    let (first, params) = &problems[0];
    let (second, other) =
        problems.get(1).map_or((None, &[][..]), |(launch, other)| (Some(launch), &other[..]));
    let mut all = params.clone();
    all.extend(other);
    all.resize(2 * params.len(), 0);
    let blocks = [first.grid[0], second.map_or(0, |launch| launch.grid[0])];
    let count = problems.len() as u32;
    for word in [blocks[0], blocks[1], count, 0] {
        all.extend(word.to_le_bytes());
    }
    let launch = Launch {
        grid: [blocks[0].max(blocks[1]), first.grid[1] * count],
        threads: first.threads,
        shared_bytes: first.shared_bytes.max(second.map_or(0, |launch| launch.shared_bytes)),
    };
    (launch, all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::kernel::Module;
    use crate::device::{Precision, Store};

    const fn kernel(entry: &'static str) -> Kernel {
        Kernel { module: Module::new("step/rows.cu"), entry }
    }

    fn launch(blocks: u32) -> Launch {
        Launch { grid: [blocks, 1], threads: 32, shared_bytes: 0 }
    }

    fn both_of(entry: &'static str, blocks: u32) -> Request {
        Request::Both(kernel(entry), vec![(launch(blocks), vec![blocks as u8; 8])])
    }

    fn product(a: Pointer, c: Pointer, store: Store) -> Request {
        let product = Product::new([8, 4, 4], (a, false), (64, false), (c, store), Precision::F32);
        Request::Products(vec![product])
    }

    fn names(requests: &[Request]) -> Vec<String> {
        let name = |request: &Request| match request {
            Request::Launch(kernel, ..) => kernel.entry.to_owned(),
            Request::Both(kernel, problems) => format!("{} x {}", kernel.entry, problems.len()),
            Request::Products(products) => format!("products x {}", products.len()),
            Request::Sums(sums) => format!("sums x {}", sums.len()),
            Request::Zero(..) => "zero".to_owned(),
            Request::Gemm(_) => "gemm".to_owned(),
        };
        requests.iter().map(name).collect()
    }

    #[test]
    fn lanes_share_launches_in_the_order_of_each() {
        let mut recording = Recording::default();
        for (lane, c) in [(0, 256), (1, 512)] {
            recording.lane = lane;
            recording.push(both_of("norm", 3 + lane as u32));
            recording.push(product(1024, c, Store::Overwrite));
            if lane == 1 {
                recording.push(Request::Launch(kernel("whole"), launch(1), vec![]));
            }
            recording.push(Request::Launch(kernel("streamed"), launch(1), vec![]));
            recording.push(both_of("mean", 1));
        }
        let merged = recording.merged();
        assert_eq!(names(&merged), ["norm x 2", "products x 2", "whole", "streamed", "streamed", "mean x 2"]);
        let Request::Both(_, problems) = &merged[0] else { panic!("the norms are first") };
        let (launch, params) = both(problems);
        assert_eq!(launch.grid, [4, 2]);
        let words: Vec<u8> = [3u32, 4, 2, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(params, [&[3; 8][..], &[4; 8], &words].concat());
    }

    #[test]
    fn products_of_a_group_share_a_launch_unless_they_write_the_same() {
        let mut recording = Recording::default();
        recording.push(product(1024, 128, Store::Overwrite));
        assert!(recording.begin_group() && !recording.begin_group());
        recording.push(product(1024, 256, Store::Overwrite));
        recording.push(product(2048, 512, Store::Overwrite));
        recording.push(product(4096, 512, Store::Add));
        recording.push(product(8192, 512, Store::Add));
        recording.end_group();
        // The first precedes the group. 512 gets two terms in one product, then the third.
        assert_eq!(names(&recording.merged()), ["products x 1", "products x 2", "products x 1"]);
    }
}
