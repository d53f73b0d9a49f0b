//! Finds the two tools that make an eBPF object: a Rust compiler that can target the kernel's virtual machine, and
//! bpf-linker built against the very LLVM which that compiler uses (LLVM's bitcode is read by its own version only).
//! What is missing is installed, in the order of its cost. How they are used is `build_ebpf`'s business.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{
    environment::{Environment, candidate, has_package_lists, install_commands, is_root},
    process::{cargo, output, run, say, which},
};

/// The kernel's virtual machine on little-endian processors, which is all that the agent runs on.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// Names a compiler to be used whatever else is there.
const COMPILER_VARIABLE: &str = "PROXIER_EBPF_RUSTC";
/// Names a bpf-linker to be used as it is; its LLVM must be the compiler's.
const LINKER_VARIABLE: &str = "PROXIER_BPF_LINKER";
const LINKER_VERSION: &str = "0.13.0";
/// The LLVM versions that bpf-linker 0.13 can be built against.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// `rust-version` of the workspace.
pub(crate) const OLDEST_COMPILER: Version = Version(1, 95);
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// Major and minor number of a Rust release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u32, u32);

impl Version {
    /// Reads `1.96.0`, `1.97.0-nightly`, or Debian's `1.96.0+dfsg1-1~deb12u2`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.0, self.1)
    }
}

/// Where a compiler has `core` for the kernel's target from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Core {
    /// Its sysroot carries the compiled library.
    Compiled,
    /// Its sysroot carries the source (rustup's component rust-src), and cargo compiles it.
    Source,
}

/// A compiler that can make eBPF.
#[derive(Debug, Clone)]
pub(crate) struct Compiler {
    /// The compiler itself, never a proxy of rustup's.
    pub(crate) rustc: PathBuf,
    /// The cargo of the same toolchain where it has one: `core` is compiled by it and must fit.
    pub(crate) cargo: Option<PathBuf>,
    pub(crate) core: Core,
    release: String,
    llvm: u32,
}

impl fmt::Display for Compiler {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = match self.core {
            Core::Compiled => "its own core",
            Core::Source => "core from rust-src",
        };
        write!(formatter, "{} {} (LLVM {}, {core})", self.rustc.display(), self.release, self.llvm)
    }
}

/// Finds a compiler, or installs what is missing for one.
pub(crate) fn compiler(environment: &Environment) -> Result<Compiler> {
    let mut tried = match search() {
        Ok(compiler) => return Ok(compiler),
        Err(tried) => tried,
    };
    if std::env::var_os(COMPILER_VARIABLE).is_some() {
        bail!(
            "{COMPILER_VARIABLE} names no compiler for {TARGET}: {}. Unset it, or name another",
            tried.join("; ")
        );
    }
    let active = active_toolchain();
    if !environment.may_install() {
        bail!(
            "no Rust compiler for {TARGET}:\n  {}\nAny one of these gets one:\n  {}",
            tried.join("\n  "),
            ways(&remedies(&facts(active.as_deref())), is_root(), knows_packages()).join("\n  ")
        );
    }
    let mut done = Vec::new();
    let mut lists_are_fresh = which("apt-get").is_none();
    loop {
        let next = remedies(&facts(active.as_deref())).into_iter().find(|remedy| !done.contains(remedy));
        // Not for the first remedy, which needs no package: reading the lists takes longer than all of it.
        if !lists_are_fresh && !matches!(next, Some(Remedy::Component { .. })) {
            lists_are_fresh = true;
            if let Err(error) = environment.refresh_lists() {
                tried.push(format!("Debian packages: {error:#}"));
            }
            continue;
        }
        let Some(remedy) = next else { break };
        say(&format!("{}: {}", remedy.title(), remedy.reason()));
        match remedy.apply(environment).map(|()| search()) {
            Ok(Ok(compiler)) => return Ok(compiler),
            Ok(Err(still)) => tried.push(format!("{}: done, but still {}", remedy.title(), still.join("; "))),
            Err(error) => {
                say(&format!("that did not work: {error:#}"));
                tried.push(format!("{}: {error:#}", remedy.title()));
            }
        }
        done.push(remedy);
    }
    bail!(
        "no Rust compiler for {TARGET} could be found or installed:\n  {}\nName one with {COMPILER_VARIABLE}",
        tried.join("\n  ")
    )
}

/// What a person types, one line for each remedy.
fn ways(remedies: &[Remedy], root: bool, packages_are_known: bool) -> Vec<String> {
    let mut ways: Vec<String> = remedies.iter().map(|remedy| remedy.commands(root).join(" && ")).collect();
    if !packages_are_known {
        ways.push("apt-get update, then this command again: there may be Debian packages".into());
    }
    ways
}

/// False where nobody has asked apt's servers yet.
fn knows_packages() -> bool {
    which("apt-get").is_none() || has_package_lists()
}

/// Every compiler that may be here; the best of the usable ones, or why each is not.
fn search() -> std::result::Result<Compiler, Vec<String>> {
    let mut usable: Vec<Compiler> = Vec::new();
    let mut tried = Vec::new();
    for (name, command) in places() {
        match inspect(&command) {
            Ok(compiler) => usable.push(compiler),
            Err(error) => tried.push(format!("{name}: {}", first_line(&format!("{error:#}")))),
        }
    }
    // Stable sort: among equals the order of `places` decides.
    usable.sort_by_key(|compiler| compiler.core);
    usable.into_iter().next().ok_or(tried)
}

/// rustup adds advice of its own below, for another purpose than ours.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn places() -> Vec<(String, Vec<String>)> {
    if let Ok(named) = std::env::var(COMPILER_VARIABLE) {
        return vec![(named.clone(), vec![named])];
    }
    let mut places: Vec<(String, Vec<String>)> = Vec::new();
    if let Ok(named) = std::env::var("RUSTC") {
        places.push((format!("RUSTC={named}"), vec![named]));
    }
    places.push(("rustc in PATH".into(), vec!["rustc".into()]));
    if Path::new("/usr/bin/rustc").exists() {
        places.push(("/usr/bin/rustc".into(), vec!["/usr/bin/rustc".into()]));
    }
    if which("rustup").is_some() {
        places.push((
            "rustup's nightly".into(),
            ["rustup", "run", "nightly", "rustc"].map(str::to_owned).to_vec(),
        ));
    }
    places
}

fn inspect(command: &[String]) -> Result<Compiler> {
    let ask = |argument: &[&str]| {
        let (program, rest) = command.split_first().context("an empty command")?;
        // cargo sets it for the toolchain that runs this program; another compiler may find a wrong library there.
        output(Command::new(program).args(rest).args(argument).env_remove("LD_LIBRARY_PATH"))
    };
    let (release, llvm) = versions(&ask(&["-vV"])?)?;
    let sysroot = PathBuf::from(ask(&["--print", "sysroot"])?.trim());
    let core = core_of(&sysroot).ok_or_else(|| {
        anyhow!("{} has neither core for {TARGET} nor the component rust-src", sysroot.display())
    })?;
    let of_sysroot = |name| Some(sysroot.join("bin").join(name)).filter(|file| file.is_file());
    let rustc = of_sysroot("rustc").with_context(|| format!("no rustc in {}/bin", sysroot.display()))?;
    // Only rustup's toolchains have the cargo that fits. Debian's compiler is driven by the cargo that runs us.
    let cargo = of_sysroot("cargo").filter(|_| core == Core::Source);
    Ok(Compiler { rustc, cargo, core, release, llvm })
}

fn core_of(sysroot: &Path) -> Option<Core> {
    let rustlib = sysroot.join("lib/rustlib");
    let compiled = std::fs::read_dir(rustlib.join(TARGET).join("lib")).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libcore-") && name.ends_with(".rlib")
        })
    });
    if compiled {
        return Some(Core::Compiled);
    }
    rustlib.join("src/rust/library/core/Cargo.toml").is_file().then_some(Core::Source)
}

/// The release and the LLVM major version in the output of `rustc -vV`, if both will do.
fn versions(verbose: &str) -> Result<(String, u32)> {
    let field = |name: &str| {
        verbose
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
            .with_context(|| format!("`rustc -vV` prints no \"{name}\""))
    };
    let release = field("release:")?;
    let version = Version::parse(release).with_context(|| format!("not a release: {release}"))?;
    if version < OLDEST_COMPILER {
        bail!("Rust {release} is older than {OLDEST_COMPILER}");
    }
    let llvm = field("LLVM version:")?;
    let major = llvm.split('.').next().and_then(|text| text.parse().ok());
    let major = major.with_context(|| format!("not an LLVM version: {llvm}"))?;
    if !LINKER_LLVM.contains(&major) {
        bail!(
            "its LLVM {llvm} is not one that bpf-linker {LINKER_VERSION} supports ({} to {})",
            LINKER_LLVM.start(),
            LINKER_LLVM.end()
        );
    }
    Ok((release.to_owned(), major))
}

/// A way to get a compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Remedy {
    /// The source of `core` for a toolchain of rustup's that is already here.
    Component { toolchain: String },
    /// Debian's compiler for web browsers: it follows Rust's releases, and `core` for eBPF is packaged with it.
    Packages,
    /// A toolchain beside the one in use.
    Nightly,
}

/// What the choice of a remedy depends on.
#[derive(Debug, Default)]
struct Facts {
    /// rustup's name of the toolchain that runs this program.
    active: Option<String>,
    rustup: bool,
    /// What apt would install as `rustc-web`, and whether it has `core` for eBPF.
    rustc_web: Option<Version>,
    core_package: bool,
}

fn active_toolchain() -> Option<String> {
    if let Ok(name) = std::env::var("RUSTUP_TOOLCHAIN") {
        return Some(name);
    }
    let line = output(Command::new("rustup").args(["show", "active-toolchain"])).ok()?;
    line.split_whitespace().next().map(str::to_owned)
}

fn facts(active: Option<&str>) -> Facts {
    Facts {
        active: active.map(str::to_owned),
        rustup: which("rustup").is_some(),
        rustc_web: candidate(DEBIAN_PACKAGES[0]).and_then(|version| Version::parse(&version)),
        core_package: candidate(DEBIAN_PACKAGES[1]).is_some(),
    }
}

/// The cheapest first: 3 MB and no root; 150 MB of packages; a whole second toolchain.
fn remedies(facts: &Facts) -> Vec<Remedy> {
    let mut remedies = Vec::new();
    if facts.rustup
        && let Some(toolchain) = &facts.active
    {
        remedies.push(Remedy::Component { toolchain: toolchain.clone() });
    }
    if facts.core_package && facts.rustc_web.is_some_and(|version| version >= OLDEST_COMPILER) {
        remedies.push(Remedy::Packages);
    }
    if facts.rustup {
        remedies.push(Remedy::Nightly);
    }
    remedies
}

impl Remedy {
    fn title(&self) -> String {
        match self {
            Self::Component { toolchain } => format!("installing rust-src for {toolchain}"),
            Self::Packages => format!("installing {}", DEBIAN_PACKAGES.join(" ")),
            Self::Nightly => "installing rustup's nightly with rust-src".into(),
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Component { .. } => "cargo compiles Rust's core library for eBPF from it",
            Self::Packages => "a Rust compiler that comes with the core library for eBPF",
            Self::Nightly => "a toolchain of its own for eBPF, as the one in use cannot be extended",
        }
    }

    fn commands(&self, root: bool) -> Vec<String> {
        match self {
            Self::Packages => install_commands(&DEBIAN_PACKAGES, root),
            Self::Component { .. } | Self::Nightly => vec![format!("rustup {}", self.rustup().join(" "))],
        }
    }

    fn rustup(&self) -> Vec<&str> {
        match self {
            Self::Component { toolchain } => vec!["component", "add", "rust-src", "--toolchain", toolchain],
            Self::Nightly => {
                vec![
                    "toolchain",
                    "install",
                    "nightly",
                    "--no-self-update",
                    "--profile",
                    "minimal",
                    "--component",
                    "rust-src",
                ]
            }
            Self::Packages => vec![],
        }
    }

    fn apply(&self, environment: &Environment) -> Result<()> {
        match self {
            Self::Packages => environment.install(&DEBIAN_PACKAGES),
            Self::Component { .. } | Self::Nightly => run(Command::new("rustup").args(self.rustup())),
        }
    }
}

/// Finds or builds the bpf-linker that fits `compiler`.
pub(crate) fn linker(environment: &Environment, compiler: &Compiler) -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(LINKER_VARIABLE) {
        return Ok(named.into());
    }
    let library = shared_llvm(environment, compiler)?;
    let home = cache()?.join(format!("bpf-linker-{LINKER_VERSION}-{}", library.name));
    let prefix = home.join("llvm");
    let linker = home.join("bin/bpf-linker");
    // Made anew each time: the compiler may have moved since, and bpf-linker finds LLVM through this folder only.
    link_library(&prefix.join("lib"), &library)?;
    if works(&linker) {
        return Ok(linker);
    }
    let mut install = cargo();
    install
        .args(["install", "bpf-linker", "--locked", "--force", "--version", LINKER_VERSION])
        .args(["--no-default-features", "--features", &format!("llvm-{}", compiler.llvm)])
        .arg("--root")
        .arg(&home)
        .env("LLVM_PREFIX", &prefix)
        // The work is done inside LLVM; optimising and debugging the shell around it doubles the time for nothing.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    let line = format!("LLVM_PREFIX={} {}", prefix.display(), crate::process::line_of(&install));
    if !environment.may_install() {
        bail!("no bpf-linker for {compiler}. Run:\n  {line}");
    }
    say(&format!(
        "installing bpf-linker {LINKER_VERSION} into {}: it links LLVM {} bitcode into an eBPF object (about a minute)",
        home.display(),
        compiler.llvm
    ));
    run(&mut install).with_context(|| format!("bpf-linker could not be built. By hand: {line}"))?;
    if !works(&linker) {
        bail!("{} was built but does not run; remove {} and try again", linker.display(), home.display());
    }
    Ok(linker)
}

fn works(linker: &Path) -> bool {
    linker.is_file()
        && output(Command::new(linker).arg("--version").env_remove("LD_LIBRARY_PATH"))
            .is_ok_and(|version| version.split_whitespace().any(|word| word == LINKER_VERSION))
}

/// Outside the work tree, so that a fresh clone does not build the linker, or fetch kernels, again.
pub(crate) fn cache() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("PROXIER_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|folder| folder.join("proxier")))
        .or_else(|| from("HOME").map(|folder| folder.join(".cache/proxier")))
        .context("no place for a cache: set PROXIER_CACHE to a folder")
}

/// A shared libLLVM: the name by which programs ask for it, and where it is.
#[derive(Debug, PartialEq, Eq)]
struct Library {
    name: String,
    path: PathBuf,
}

/// The libLLVM that the compiler itself uses. It is the one that fits, and it is there: no LLVM package is needed.
fn shared_llvm(environment: &Environment, compiler: &Compiler) -> Result<Library> {
    let loaded = output(Command::new("ldd").arg(&compiler.rustc).env_remove("LD_LIBRARY_PATH"))?;
    if let Some(library) = llvm_in(&loaded) {
        return Ok(library);
    }
    // A compiler with LLVM built in. The distribution's library of the same major version is the next best.
    let version = compiler.llvm;
    let prefix = std::env::var_os("LLVM_PREFIX")
        .map_or_else(|| format!("/usr/lib/llvm-{version}").into(), PathBuf::from);
    let path = prefix.join("lib/libLLVM.so");
    if !path.exists() {
        say(&format!("installing llvm-{version}-dev: {} has its LLVM built in", compiler.rustc.display()));
        environment.install(&[&format!("llvm-{version}-dev")])?;
    }
    let path = path.canonicalize().with_context(|| {
        format!("no LLVM {version} library for bpf-linker: set LLVM_PREFIX to where {} is", path.display())
    })?;
    let name = path.file_name().context("a library without a name")?.to_string_lossy().into_owned();
    Ok(Library { name, path })
}

/// The line `<name> => <path> (<address>)` of ldd's for libLLVM.
fn llvm_in(loaded: &str) -> Option<Library> {
    loaded.lines().find_map(|line| {
        let (name, path) = line.trim().split_once(" => ")?;
        let path = path.rsplit_once(" (").map_or(path, |(path, _address)| path);
        (name.starts_with("libLLVM") && path.starts_with('/'))
            .then(|| Library { name: name.to_owned(), path: path.into() })
    })
}

/// `libLLVM.so` is what a linker looks for, the library's own name what the program asks for when it starts.
fn link_library(folder: &Path, library: &Library) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    for name in ["libLLVM.so", &library.name] {
        let link = folder.join(name);
        if std::fs::read_link(&link).is_ok_and(|target| target == library.path) {
            continue;
        }
        // Put in place by a rename, as another build may be using the old one now.
        let new = folder.join(format!("{name}.{}", std::process::id()));
        std::os::unix::fs::symlink(&library.path, &new)
            .and_then(|()| std::fs::rename(&new, &link))
            .with_context(|| format!("{}: cannot be made", link.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_rust_and_of_debian_are_read() {
        assert_eq!(Version::parse("1.96.0"), Some(Version(1, 96)));
        assert_eq!(Version::parse("1.97.0-nightly"), Some(Version(1, 97)));
        assert_eq!(Version::parse("1.85.0+dfsg3-1~deb12u3"), Some(Version(1, 85)));
        assert_eq!(Version::parse("nightly"), None);
        assert!(Version(2, 0) > Version(1, 96));
    }

    fn verbose(release: &str, llvm: &str) -> String {
        format!(
            "rustc {release} (0123 2026-05-25)\nbinary: rustc\nrelease: {release}\nLLVM version: {llvm}\n"
        )
    }

    #[test]
    fn a_compiler_that_will_do_is_taken() {
        assert_eq!(versions(&verbose("1.96.0", "22.1.8")).unwrap(), ("1.96.0".to_owned(), 22));
    }

    #[test]
    fn an_old_compiler_and_an_unknown_llvm_are_refused_with_the_reason() {
        let error = versions(&verbose("1.85.0", "19.1.7")).unwrap_err().to_string();
        assert!(error.contains("1.85.0 is older than 1.95"), "{error}");
        let error = versions(&verbose("1.99.0", "24.1.0")).unwrap_err().to_string();
        assert!(error.contains("LLVM 24.1.0") && error.contains("21 to 23"), "{error}");
        let error = versions("rustc 1.96.0\n").unwrap_err().to_string();
        assert!(error.contains("release:"), "{error}");
    }

    #[test]
    fn a_sysroot_with_compiled_core_is_told_from_one_with_the_source() {
        let root = std::env::temp_dir().join(format!("proxier-xtask-sysroot-{}", std::process::id()));
        let compiled = root.join("lib/rustlib").join(TARGET).join("lib");
        let source = root.join("lib/rustlib/src/rust/library/core");
        std::fs::create_dir_all(&source).unwrap();
        assert_eq!(core_of(&root), None);
        std::fs::write(source.join("Cargo.toml"), "").unwrap();
        assert_eq!(core_of(&root), Some(Core::Source));
        std::fs::create_dir_all(&compiled).unwrap();
        assert_eq!(core_of(&root), Some(Core::Source), "an empty folder is no library");
        std::fs::write(compiled.join("libcore-0123456789abcdef.rlib"), "").unwrap();
        assert_eq!(core_of(&root), Some(Core::Compiled));
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_cheapest_remedy_comes_first() {
        let facts = Facts {
            active: Some("stable-x86_64-unknown-linux-gnu".into()),
            rustup: true,
            rustc_web: Some(Version(1, 96)),
            core_package: true,
        };
        let remedies = remedies(&facts);
        assert_eq!(
            remedies.iter().map(|remedy| remedy.commands(true).join(" && ")).collect::<Vec<_>>(),
            [
                "rustup component add rust-src --toolchain stable-x86_64-unknown-linux-gnu",
                "apt-get update && apt-get install -y --no-install-recommends rustc-web libstd-rust-web-dev-bpf",
                "rustup toolchain install nightly --no-self-update --profile minimal --component rust-src",
            ]
        );
    }

    #[test]
    fn packages_that_are_too_old_or_not_there_are_no_remedy() {
        let old = Facts { rustc_web: Some(Version(1, 85)), core_package: true, ..Facts::default() };
        assert_eq!(remedies(&old), []);
        let without_core = Facts { rustc_web: Some(Version(1, 96)), ..Facts::default() };
        assert_eq!(remedies(&without_core), []);
    }

    #[test]
    fn a_machine_that_never_asked_for_packages_is_told_to() {
        assert_eq!(ways(&[], true, true), [] as [&str; 0]);
        let ways = ways(&[Remedy::Nightly], true, false);
        assert!(ways[0].starts_with("rustup toolchain install nightly"), "{ways:?}");
        assert!(ways[1].starts_with("apt-get update"), "{ways:?}");
    }

    #[test]
    fn without_rustup_only_packages_are_left() {
        let facts = Facts { rustc_web: Some(Version(1, 96)), core_package: true, ..Facts::default() };
        assert_eq!(remedies(&facts), [Remedy::Packages]);
    }

    #[test]
    fn the_llvm_of_a_compiler_is_the_one_it_loads() {
        let debian = "\tlinux-vdso.so.1 (0x00007f27)\n\tlibLLVM.so.22.1 => /lib/x86_64-linux-gnu/libLLVM.so.22.1 (0x00007f78)\n\tlibc.so.6 => /lib/libc.so.6 (0x1)\n";
        assert_eq!(
            llvm_in(debian),
            Some(Library {
                name: "libLLVM.so.22.1".into(),
                path: "/lib/x86_64-linux-gnu/libLLVM.so.22.1".into()
            })
        );
        assert_eq!(llvm_in("\tlibLLVM.so.22.1 => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x1)\n"), None);
    }

    #[test]
    fn the_library_is_found_under_both_names_and_follows_a_move() {
        let folder = std::env::temp_dir().join(format!("proxier-xtask-llvm-{}", std::process::id()));
        let at = |path: &str| Library { name: "libLLVM.so.22.1".into(), path: path.into() };
        link_library(&folder, &at("/old/libLLVM.so.22.1")).unwrap();
        link_library(&folder, &at("/new/libLLVM.so.22.1")).unwrap();
        for name in ["libLLVM.so", "libLLVM.so.22.1"] {
            assert_eq!(std::fs::read_link(folder.join(name)).unwrap(), Path::new("/new/libLLVM.so.22.1"));
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "nothing else is left behind");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
