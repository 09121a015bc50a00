//! Products of tiles on AMX: eight tile registers of 16 rows of 64 bytes.
//!
//! std has no stable intrinsics for AMX, so tiles are loaded, multiplied and stored in inline
//! assembly. No tile register holds a value between two blocks of assembly; only the configuration
//! does.

use super::{Begin, Product, TILE};
use std::arch::asm;
use std::arch::x86_64::*;

/// Proof that the process may use the tile registers: that the processor has AMX-TILE and AMX-BF16,
/// and that the operating system grants them.
#[derive(Clone, Copy, Debug)]
pub struct Amx(());

/// Asks Linux for the tiles, for all threads of the process.
fn granted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: the call changes a permission of this process; it takes no pointer.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

impl Amx {
    /// `None` if the processor or the operating system lacks it.
    pub fn new() -> Option<Self> {
        #[allow(unused_unsafe, reason = "safe in newer versions of std")]
        // SAFETY: every x86-64 processor has CPUID.
        let (largest, leaf) = unsafe { (__cpuid(0).eax, __cpuid_count(7, 0)) };
        let here = largest >= 7 && leaf.edx & (1 << 22) != 0 && leaf.edx & (1 << 24) != 0;
        (here && granted()).then_some(Self(()))
    }

    /// Configures the tile registers of this thread.
    pub(super) fn configure(self) {
        // SAFETY: `self` exists, so the registers are there. The configuration has 64 bytes.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly));
        }
    }

    /// Ends the configuration of this thread.
    pub(super) fn release(self) {
        // SAFETY: the registers are there. No value in them is needed.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// `product` of `m` rows and `n` columns of tiles.
    ///
    /// # Safety
    /// The tile registers of this thread are configured, and all tiles are in bounds.
    pub unsafe fn multiply(self, product: &Product, [m, n]: [usize; 2]) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            for row in (0..m).step_by(2) {
                for column in (0..n).step_by(2) {
                    match (row + 1 < m, column + 1 < n) {
                        (true, true) => product.square(row, column),
                        (true, false) => product.tall(row, column),
                        (false, true) => product.broad(row, column),
                        (false, false) => product.single(row, column),
                    }
                }
            }
        }
    }

    /// Runs `4 * rounds` products of tiles, operands in registers, and returns the number of
    /// multiply-adds.
    ///
    /// # Safety
    /// The tile registers of this thread are configured.
    pub unsafe fn multiply_adds(self, rounds: usize) -> usize {
        if rounds > 0 {
            // SAFETY: guaranteed by the caller; no memory is accessed.
            unsafe {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                    "2:",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) rounds => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem),
                );
            }
        }
        4 * rounds * TILE * TILE * 2 * TILE
    }
}

/// All eight tiles have 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration([u8; 64]);
static CONFIGURATION: Configuration = {
    let mut bytes = [0; 64];
    bytes[0] = 1; // palette
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64; // bytes per row
        bytes[48 + tile] = 16; // rows
        tile += 1;
    }
    Configuration(bytes)
};

/// Assembly for a block of the output: loads or zeroes its tiles, adds the products of all steps of
/// the inner dimension, stores the tiles.
macro_rules! block {
    ($product:ident, $row:ident, $column:ident, [$($load:literal)*], [$($zero:literal)*], [$($step:literal)*], [$($store:literal)*]) => {{
        let Product { left, left_row, right, right_row, out, out_row, k, begin } = *$product;
        let left = left.wrapping_byte_add($row * TILE * left_row);
        let right = right.wrapping_byte_add($column * 64);
        let out = out.wrapping_byte_add($row * TILE * out_row + $column * 64);
        asm!(
            "test {zero:e}, {zero:e}",
            "jnz 3f",
            $($load,)*
            "jmp 2f",
            "3:",
            $($zero,)*
            "2:",
            $($step,)*
            "add {left}, 64",
            "add {lower}, 64",
            "add {right}, {right_step}",
            "dec {k}",
            "jnz 2b",
            $($store,)*
            zero = in(reg) u32::from(begin == Begin::Zero),
            left = inout(reg) left => _,
            lower = inout(reg) left.wrapping_byte_add(TILE * left_row) => _,
            left_row = in(reg) left_row,
            right = inout(reg) right => _,
            right_row = in(reg) right_row,
            right_step = in(reg) TILE * right_row,
            out = in(reg) out,
            below = in(reg) out.wrapping_byte_add(TILE * out_row),
            out_row = in(reg) out_row,
            k = inout(reg) k => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    }};
}

impl Product {
    /// Two by two tiles of the output.
    ///
    /// # Safety
    /// The tiles are configured, and all values are in bounds.
    #[inline(always)]
    unsafe fn square(&self, row: usize, column: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            block!(
                self, row, column,
                ["tileloadd tmm0, [{out} + {out_row}*1]" "tileloadd tmm1, [{out} + {out_row}*1 + 64]"
                 "tileloadd tmm2, [{below} + {out_row}*1]" "tileloadd tmm3, [{below} + {out_row}*1 + 64]"],
                ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                ["tileloadd tmm4, [{left} + {left_row}*1]" "tileloadd tmm6, [{right} + {right_row}*1]"
                 "tdpbf16ps tmm0, tmm4, tmm6" "tileloadd tmm7, [{right} + {right_row}*1 + 64]"
                 "tdpbf16ps tmm1, tmm4, tmm7" "tileloadd tmm5, [{lower} + {left_row}*1]"
                 "tdpbf16ps tmm2, tmm5, tmm6" "tdpbf16ps tmm3, tmm5, tmm7"],
                ["tilestored [{out} + {out_row}*1], tmm0" "tilestored [{out} + {out_row}*1 + 64], tmm1"
                 "tilestored [{below} + {out_row}*1], tmm2" "tilestored [{below} + {out_row}*1 + 64], tmm3"]
            );
        }
    }

    /// Two tiles of the output, one below the other.
    ///
    /// # Safety
    /// As [`square`](Self::square).
    #[inline(always)]
    unsafe fn tall(&self, row: usize, column: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            block!(
                self, row, column,
                ["tileloadd tmm0, [{out} + {out_row}*1]" "tileloadd tmm2, [{below} + {out_row}*1]"],
                ["tilezero tmm0" "tilezero tmm2"],
                ["tileloadd tmm4, [{left} + {left_row}*1]" "tileloadd tmm6, [{right} + {right_row}*1]"
                 "tdpbf16ps tmm0, tmm4, tmm6" "tileloadd tmm5, [{lower} + {left_row}*1]"
                 "tdpbf16ps tmm2, tmm5, tmm6"],
                ["tilestored [{out} + {out_row}*1], tmm0" "tilestored [{below} + {out_row}*1], tmm2"]
            );
        }
    }

    /// Two tiles of the output, one beside the other.
    ///
    /// # Safety
    /// As [`square`](Self::square).
    #[inline(always)]
    unsafe fn broad(&self, row: usize, column: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            block!(
                self, row, column,
                ["tileloadd tmm0, [{out} + {out_row}*1]" "tileloadd tmm1, [{out} + {out_row}*1 + 64]"
                 "/* {below} {lower} */"],
                ["tilezero tmm0" "tilezero tmm1"],
                ["tileloadd tmm4, [{left} + {left_row}*1]" "tileloadd tmm6, [{right} + {right_row}*1]"
                 "tdpbf16ps tmm0, tmm4, tmm6" "tileloadd tmm7, [{right} + {right_row}*1 + 64]"
                 "tdpbf16ps tmm1, tmm4, tmm7"],
                ["tilestored [{out} + {out_row}*1], tmm0" "tilestored [{out} + {out_row}*1 + 64], tmm1"]
            );
        }
    }

    /// One tile of the output.
    ///
    /// # Safety
    /// As [`square`](Self::square).
    #[inline(always)]
    unsafe fn single(&self, row: usize, column: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            block!(
                self, row, column,
                ["tileloadd tmm0, [{out} + {out_row}*1]" "/* {below} {lower} */"],
                ["tilezero tmm0"],
                ["tileloadd tmm4, [{left} + {left_row}*1]" "tileloadd tmm6, [{right} + {right_row}*1]"
                 "tdpbf16ps tmm0, tmm4, tmm6"],
                ["tilestored [{out} + {out_row}*1], tmm0"]
            );
        }
    }
}
