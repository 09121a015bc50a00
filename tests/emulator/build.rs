//! Compiles the kernels as C++: the runtime plainly, the kernels with every memory access announced to it.

fn main() {
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=../../kernels");
    let base = || {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").opt_level(2).include("src").include("../../kernels");
        // Without -ffp-contract=off products would be fused into sums where the kernels say that they must not be.
        build
            .flag("-ffp-contract=off")
            .flag("-fno-exceptions")
            .flag("-fno-rtti")
            .define("DFAR_EMULATOR", None)
            .warnings(true);
        build
    };
    base().file("src/runtime.cpp").compile("dfar_emulator_runtime");
    // -fsanitize=thread makes the compiler announce each access by a call; nothing is linked that answers those
    // calls but runtime.cpp. Its race detector is not used.
    let mut kernels = base();
    kernels.flag("-fsanitize=thread").flag("-Wno-unknown-pragmas").flag("-Wno-unused-parameter");
    for source in ["bf16", "f16", "f32", "faults"] {
        kernels.file(format!("src/{source}.cpp"));
    }
    kernels.compile("dfar_emulator_kernels");
}
