//! Every binary prints shell completions and writes man pages.

use std::process::Command;

const BINARIES: [(&str, &str, &[&str]); 3] = [
    (env!("CARGO_BIN_EXE_dfar-data"), "dfar-data", &["import", "--skip-bad-rows", "export"]),
    (env!("CARGO_BIN_EXE_dfar-train"), "dfar-train", &["score", "--exclude-seen", "evaluate"]),
    (env!("CARGO_BIN_EXE_dfar-bench"), "dfar-bench", &["verify", "--precision", "limits"]),
];

#[test]
fn completions_name_the_subcommands_and_flags() {
    for (binary, name, words) in BINARIES {
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            let output = Command::new(binary).args(["completions", shell]).output().unwrap();
            let script = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success() && script.contains(name), "{name} {shell}");
            for word in words {
                let word = if shell == "fish" { word.trim_start_matches('-') } else { word };
                assert!(script.contains(word), "{word} of {name} in {shell}");
            }
        }
    }
}

#[test]
fn man_pages_describe_every_subcommand() {
    let folder = tempfile::tempdir().unwrap();
    for (binary, name, words) in BINARIES {
        // The folder is created.
        let pages = folder.path().join(name).join("man1");
        let status = Command::new(binary).arg("man").arg(&pages).status().unwrap();
        assert!(status.success());
        let page = |name: &str| std::fs::read_to_string(pages.join(format!("{name}.1"))).unwrap();
        assert!(page(name).contains("Exit codes") || name == "dfar-bench");
        for command in words.iter().filter(|word| !word.starts_with('-')) {
            assert!(page(&format!("{name}-{command}")).contains(".SH OPTIONS"), "{command} of {name}");
        }
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = Command::new(BINARIES[0].0).arg("man").arg(&file).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && message.contains("man pages"), "{message}");
}
