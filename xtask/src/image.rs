//! `cargo xtask image`: the container image, made of a static agent and nothing else. No registry is asked, and the same
//! commit gives the same image (at the same place: the kernel programs' debug information names where they were compiled).
//! With `--test` the image is run as a node would run it: those tests are `tests/tests/image.rs`.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use proxier_tests::container;

use crate::{
    build_ebpf,
    environment::{Environment, LAB_TOOLS, Tool, as_root_hint, is_root},
    process::{cargo, output, run, say, workspace},
    test,
};

/// What an image is called that is not given a name: no registry, and the version that `deploy/kustomize` asks for.
const DEFAULT_TAG: &str = concat!("localhost/proxier:", env!("CARGO_PKG_VERSION"));

const BUILDAH: Tool = Tool {
    program: "buildah",
    packages: &["buildah"],
    purpose: "makes the container image, without a daemon and without a registry",
};

/// Between flags in CARGO_ENCODED_RUSTFLAGS.
const SEPARATOR: &str = "\x1f";

/// What runs the image in its tests.
const PODMAN: &[Tool] = &[
    Tool { program: "podman", packages: &["podman"], purpose: "runs the image as a node would" },
    Tool { program: "runc", packages: &["runc"], purpose: "starts containers for podman" },
];

/// Arguments of `image`.
#[derive(Debug, clap::Args)]
pub(crate) struct ImageOptions {
    /// The image's name
    #[arg(long, value_name = "NAME:TAG", default_value = DEFAULT_TAG)]
    tag: String,
    /// Write the image to a file as well: oci-archive:FILE or docker-archive:FILE
    #[arg(long, value_name = "FORMAT:FILE", value_parser = archive)]
    output: Option<String>,
    /// The profile of cargo to build the agent with: `dev` is compiled in half the time, and is as static
    #[arg(long, value_name = "NAME", default_value = "release")]
    profile: String,
    /// One more label, such as org.opencontainers.image.source=https://...; repeatable
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<String>,
    /// Run the image in containers, on a node of the lab, and send traffic through it (as root)
    #[arg(long)]
    test: bool,
    /// Change nothing on this machine: name the commands that would, and fail
    #[arg(long)]
    no_install: bool,
}

/// Runs the command; whether the tests passed, if there were to be any.
pub(crate) fn run_command(options: &ImageOptions) -> Result<bool> {
    if options.test && !is_root() {
        bail!(
            "the image's tests make network namespaces, which needs root. Run: {}",
            as_root_hint("image --test")
        );
    }
    let environment = Environment::new(!options.no_install);
    environment.ensure_tools(&[BUILDAH])?;
    if options.test {
        environment.ensure_tools(PODMAN)?;
        environment.ensure_tools(LAB_TOOLS)?;
        environment.ensure_bpf_file_system()?;
    }
    let object = build_ebpf::build(&environment)?;
    let agent = build_static_agent(&options.profile)?;
    let image = build(&agent, &options.tag, &options.labels)?;
    if let Some(archive) = &options.output {
        push(&options.tag, archive)?;
    }
    print!("{}", report(&options.tag, &image, options.output.as_deref(), &agent)?);
    if !options.test {
        return Ok(true);
    }
    say("running the image in containers");
    let mut command = cargo();
    command.args(["test", "--package", "proxier-tests", "--test", "image"]);
    command
        .env(container::IMAGE, &options.tag)
        .env("PROXIER_AGENT", &agent)
        .env("PROXIER_BPF_OBJECT", object);
    Ok(run(&mut command).inspect_err(|error| say(&format!("{error:#}"))).is_ok())
}

/// `FORMAT:FILE`, of the formats that everything reads which loads images.
fn archive(text: &str) -> Result<String, String> {
    match text.split_once(':') {
        Some(("oci-archive" | "docker-archive", file)) if !file.is_empty() => Ok(text.to_owned()),
        _ => Err("write oci-archive:FILE or docker-archive:FILE".to_owned()),
    }
}

fn label(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(text.to_owned()),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// Builds the agent so that it needs no file but itself.
fn build_static_agent(profile: &str) -> Result<PathBuf> {
    // A target named is one to which RUSTFLAGS apply alone: procedural macros, which cannot be static, are the host's.
    let target = host()?;
    say(&format!(
        "building the agent for {target}, static, with the profile {profile} (minutes, the first time)"
    ));
    let flags = flags(std::env::var("RUSTFLAGS").ok().as_deref(), &cargo_home()?);
    test::build_agent_with(|command| {
        command.args(["--profile", profile, "--target", &target]).env("CARGO_ENCODED_RUSTFLAGS", flags);
    })
}

/// In cargo's encoding, where a blank in a path is no separator: the user's own flags, a static program, and no trace of where on
/// which machine the agent was built, which would also make it another one.
fn flags(given: Option<&str>, cargo_home: &Path) -> OsString {
    let mut flags: OsString =
        given.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(SEPARATOR).into();
    if !flags.is_empty() {
        flags.push(SEPARATOR);
    }
    flags.push("-Ctarget-feature=+crt-static");
    for (path, instead) in [(workspace(), "/proxier"), (cargo_home, "/cargo")] {
        flags.push(SEPARATOR);
        flags.push("--remap-path-prefix=");
        flags.push(path);
        flags.push("=");
        flags.push(instead);
    }
    flags
}

/// Where cargo keeps the sources of other crates.
fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let home = std::env::home_dir().context("neither CARGO_HOME nor HOME says where cargo keeps crates")?;
    Ok(home.join(".cargo"))
}

fn host() -> Result<String> {
    host_in(&output(cargo().arg("-vV"))?).context("`cargo -vV` does not say which host it is for")
}

fn host_in(version: &str) -> Option<String> {
    version.lines().find_map(|line| line.strip_prefix("host: ")).map(str::to_owned)
}

/// Makes the image, into the local container storage, and returns its id.
fn build(agent: &Path, tag: &str, labels: &[String]) -> Result<String> {
    let context = tempfile::tempdir().context("no directory for what goes into the image")?;
    let copy = context.path().join("proxier");
    fs::copy(agent, &copy).with_context(|| format!("{} cannot be copied", agent.display()))?;
    // Read and run by everybody, written by nobody: root's in the image, as buildah makes what it copies.
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o555))?;
    let id_file = context.path().join("id");
    let mut command = Command::new("buildah");
    command.args(["build", "--quiet", "--format=oci", "--pull=never", "--network=none", "--squash"]);
    // buildah's own version in the image would make it another with each.
    command.args(["--identity-label=false", "--omit-history"]);
    command.arg(format!("--timestamp={}", created()?));
    for label in own_labels(revision().as_deref()).iter().chain(labels) {
        command.args(["--label", label]);
    }
    command.arg("--tag").arg(tag).arg("--iidfile").arg(&id_file);
    command.arg("--ignorefile=/dev/null");
    command.arg("--file").arg(workspace().join("deploy/image/Containerfile")).arg(context.path());
    output(&mut command).context("the image cannot be made")?;
    let id = fs::read_to_string(&id_file).context("buildah made the image, but does not say which it is")?;
    Ok(id.trim().trim_start_matches("sha256:").to_owned())
}

/// Those that the Containerfile cannot know.
fn own_labels(revision: Option<&str>) -> Vec<String> {
    let label = |key: &str, value: &str| format!("org.opencontainers.image.{key}={value}");
    let mut labels = vec![label("version", env!("CARGO_PKG_VERSION"))];
    labels.extend(revision.map(|revision| label("revision", revision)));
    labels
}

/// The commit that the image is made of, if it is one: a changed work tree is none.
fn revision() -> Option<String> {
    let commit = git(&["rev-parse", "HEAD"]).ok()?;
    let is_clean = git(&["status", "--porcelain"]).is_ok_and(|changes| changes.is_empty());
    Some(if is_clean { commit } else { format!("{commit}-dirty") })
}

/// The time that files and image bear: that of the commit, or what SOURCE_DATE_EPOCH says (reproducible-builds.org).
fn created() -> Result<u64> {
    let seconds = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(seconds) => seconds,
        Err(_) => git(&["log", "-1", "--format=%ct"]).context(
            "no commit whose time the image could bear: set SOURCE_DATE_EPOCH to seconds since 1970",
        )?,
    };
    seconds
        .trim()
        .parse()
        .with_context(|| format!("SOURCE_DATE_EPOCH: {seconds:?} is no number of seconds since 1970"))
}

fn git(arguments: &[&str]) -> Result<String> {
    Ok(output(Command::new("git").arg("-C").arg(workspace()).args(arguments))?.trim().to_owned())
}

fn push(tag: &str, archive: &str) -> Result<()> {
    // docker-archive is not written over, so that images can be added to it: here it is one image.
    if let Some((_, file)) = archive.split_once(':')
        && let Err(error) = fs::remove_file(file)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("{file} cannot be replaced"));
    }
    // An archive that is loaded elsewhere is to have the name there as well.
    let with_name = format!("{archive}:{tag}");
    output(Command::new("buildah").args(["push", "--quiet", tag, &with_name])).map(drop)
}

/// What to know of the image, a line each.
fn report(tag: &str, id: &str, archive: Option<&str>, agent: &Path) -> Result<String> {
    let listed = output(Command::new("buildah").args(["images", "--json", tag]))?;
    let listed: serde_json::Value = serde_json::from_str(&listed).context("`buildah images --json`")?;
    let digest = listed[0]["digest"].as_str().context("buildah does not know the image's digest")?;
    let bytes = fs::metadata(agent).with_context(|| agent.display().to_string())?.len();
    let mut text =
        format!("image: {tag}\nid: sha256:{id}\ndigest: {digest}\nsize: {bytes} bytes, one file\n");
    if let Some(archive) = archive {
        let _ = writeln!(text, "archive: {archive}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_bears_the_version_and_the_commit_if_there_is_one() {
        let version = format!("org.opencontainers.image.version={}", env!("CARGO_PKG_VERSION"));
        let revision = "org.opencontainers.image.revision=abc".to_owned();
        assert_eq!(own_labels(Some("abc")), [version.clone(), revision]);
        assert_eq!(own_labels(None), [version]);
    }

    #[test]
    fn the_agent_is_static_whatever_flags_the_user_has() {
        let after = |given| flags(given, Path::new("/a b")).into_string().unwrap();
        let own = after(None);
        assert!(own.starts_with("-Ctarget-feature=+crt-static\x1f"), "{own}");
        assert!(own.ends_with("\x1f--remap-path-prefix=/a b=/cargo"), "{own}");
        assert_eq!(after(Some(" -C  target-cpu=v3")), format!("-C\x1ftarget-cpu=v3\x1f{own}"));
    }

    #[test]
    fn only_archives_can_be_written() {
        for good in ["oci-archive:/tmp/a.tar", "docker-archive:a.tar"] {
            assert_eq!(archive(good), Ok(good.to_owned()));
        }
        for bad in ["a.tar", "oci-archive:", "docker://registry.example/proxier"] {
            assert!(archive(bad).unwrap_err().contains("oci-archive:FILE"), "{bad}");
        }
    }

    #[test]
    fn the_host_is_the_one_that_cargo_names() {
        let version = "cargo 1.95.0 (f2d3ce0bd 2026-03-21)\nrelease: 1.95.0\nhost: aarch64-unknown-linux-gnu\nos: Debian\n";
        assert_eq!(host_in(version).as_deref(), Some("aarch64-unknown-linux-gnu"));
        assert_eq!(host_in("cargo 1.95.0\n"), None);
    }
}
