//! A virtual machine that starts from this machine's own programs and one kernel, runs the checks and ends. It has no
//! disk and no network: what it needs is in its memory from the start, what it finds comes out of a serial line.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{Image, Line};
use crate::process::{output, run, say, which, workspace};

/// What runs in the machine, beside the agent and this program.
const PROGRAMS: [&str; 9] = ["sh", "mount", "ln", "ip", "tc", "bpftool", "ethtool", "kmod", "mkdir"];
/// All that the lab's traffic and Debian's own dependencies may ask for; a whole kernel's modules are ten times as much.
const MODULES: [&str; 5] =
    ["kernel/net", "kernel/lib", "kernel/crypto", "kernel/arch/x86/crypto", "kernel/drivers/net/veth.ko"];
/// What the kernel loads by itself only where it finds modprobe.
const LOADED: &str = "veth sch_ingress cls_bpf";
/// A machine with a processor of its own has started by then. Where one virtual machine within another does not work,
/// it hangs.
const STARTED_WITHIN: Duration = Duration::from_secs(45);
const MEMORY: &str = "2048";
const CONSOLE_LINES: usize = 40;

/// A machine that can be started.
pub(super) struct Machine {
    kernel: PathBuf,
    initramfs: PathBuf,
    console: PathBuf,
    report: PathBuf,
}

impl Machine {
    /// Collects what the machine will need, in the build folder.
    pub(super) fn prepare(image: &Image, agent: &Path, object: &Path) -> Result<Self> {
        let folder = workspace().join("target/kernels").join(&image.release);
        let root = folder.join("root");
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("{}: cannot be removed", folder.display()))?;
        }
        for name in ["proc", "sys", "dev", "tmp", "run", "sbin", "lib/modules"] {
            fs::create_dir_all(root.join(name))?;
        }
        let myself = std::env::current_exe().context("where this program is")?;
        let mut files: BTreeSet<PathBuf> = BTreeSet::new();
        for program in PROGRAMS {
            files.insert(which(program).with_context(|| format!("{program} is not in PATH"))?);
        }
        files.extend([agent.to_owned(), myself.clone()]);
        for file in files.clone() {
            files.extend(libraries(&file)?);
        }
        files.insert(object.to_owned());
        let examples = workspace().join("deploy/examples");
        for entry in fs::read_dir(&examples).with_context(|| format!("{}", examples.display()))? {
            let path = entry?.path();
            // Manifests; what is in folders beside them is for other tests.
            if path.is_file() {
                files.insert(path);
            }
        }
        // The lab finds the examples from its own folder, which has to be there, if empty.
        let tests = workspace().join("tests");
        fs::create_dir_all(root.join(tests.strip_prefix("/").unwrap_or(&tests)))?;
        for file in &files {
            copy(file, &root)?;
        }
        copy_modules(image, &root)?;
        // kmod is all of its programs, and tells them by the name.
        let kmod = which("kmod").context("kmod is not in PATH")?;
        std::os::unix::fs::symlink(&kmod, root.join("sbin/modprobe"))?;
        write_init(&root, &myself, agent, object)?;
        let initramfs = folder.join("initramfs");
        pack(&root, &initramfs)?;
        Ok(Self {
            kernel: image.kernel(),
            initramfs,
            console: folder.join("console.log"),
            report: folder.join("report.log"),
        })
    }

    /// Starts it, shows what it reports, and returns that.
    pub(super) fn run(&self, timeout: Duration, emulate: bool) -> Result<String> {
        if !emulate && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok() {
            if let Some(report) = self.attempt(timeout, true)? {
                return Ok(report);
            }
            say(&format!(
                "/dev/kvm is there, but the machine does not start with it (see {}): the processor is emulated",
                self.console.display()
            ));
        }
        Ok(self.attempt(timeout, false)?.unwrap_or_default())
    }

    /// None: it did not start, and another way may help.
    fn attempt(&self, timeout: Duration, kvm: bool) -> Result<Option<String>> {
        for file in [&self.console, &self.report] {
            fs::write(file, "").with_context(|| format!("{}: cannot be written", file.display()))?;
        }
        let mut running = Running(self.command(kvm).spawn().context("qemu-system-x86_64 did not start")?);
        let begun = Instant::now();
        let mut shown = 0;
        loop {
            // Asked first: what it wrote before it ended is then in the report for sure.
            let ended = running.0.try_wait().context("waiting for qemu")?.is_some();
            let bytes = fs::read(&self.report).context("the report")?;
            let report = String::from_utf8_lossy(&bytes).into_owned();
            let whole = report.rfind('\n').map_or(0, |end| end + 1);
            for line in report.get(shown..whole).unwrap_or_default().lines() {
                println!("  {}", line.trim_end());
            }
            shown = whole;
            let has = |wanted: &Line| report.lines().any(|line| Line::parse(line).as_ref() == Some(wanted));
            let started = has(&Line::Started);
            if kvm && !started && (ended || begun.elapsed() > STARTED_WITHIN) {
                return Ok(None);
            }
            let late = begun.elapsed() > timeout;
            if ended || late {
                if !has(&Line::Done) {
                    let why = if late { "it takes too long" } else { "it has ended early" };
                    say(&format!("{why}. The end of {}:\n{}", self.console.display(), self.end_of_console()));
                }
                return Ok(Some(report));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn command(&self, kvm: bool) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        // Without what other virtual machines around this one may not let through. And emulated, one processor: a kernel
        // that patches its own code while another processor runs it does not survive in QEMU 7.2.
        let how = if kvm { ["kvm", "host,-arch-capabilities", "2"] } else { ["tcg", "max", "1"] };
        command
            .args(["-accel", how[0], "-cpu", how[1], "-m", MEMORY, "-smp", how[2], "-no-reboot"])
            .args(["-display", "none", "-monitor", "none", "-nic", "none"])
            .arg("-serial")
            .arg(file_device(&self.console))
            .arg("-serial")
            .arg(file_device(&self.report))
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .stdin(Stdio::null());
        command
    }

    fn end_of_console(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = console.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
    }
}

/// Ended when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it is already gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn file_device(path: &Path) -> std::ffi::OsString {
    let mut device = std::ffi::OsString::from("file:");
    device.push(path);
    device
}

/// The shared libraries of a program, and the loader that it names.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    // A program without any is no error of ldd's that matters.
    let list = output(Command::new("ldd").arg(program)).unwrap_or_default();
    let found = libraries_in(&list);
    if let Some(missing) = list.lines().find(|line| line.contains("not found")) {
        bail!("{} cannot run: {}", program.display(), missing.trim());
    }
    Ok(found)
}

/// The paths in lines such as `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f...)`.
fn libraries_in(list: &str) -> Vec<PathBuf> {
    list.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

/// To the same path below `root`, so that nothing notices; what a link leads to, not the link.
fn copy(file: &Path, root: &Path) -> Result<()> {
    let to = root.join(file.strip_prefix("/").unwrap_or(file));
    let folder = to.parent().context("a file has a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    fs::copy(file, &to).with_context(|| format!("{}: cannot be copied", file.display()))?;
    Ok(())
}

fn copy_modules(image: &Image, root: &Path) -> Result<()> {
    let (from, to) = (image.modules(), root.join("lib/modules").join(&image.release));
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        fs::create_dir_all(&to)?;
        fs::copy(from.join(name), to.join(name)).with_context(|| format!("{}: {name}", from.display()))?;
    }
    for name in MODULES {
        // Newer kernels' modules are compressed, each a file.
        for file in [from.join(name), from.join(format!("{name}.xz"))].iter().filter(|file| file.exists()) {
            let folder = to.join(name);
            let folder = folder.parent().context("a module has a folder")?;
            fs::create_dir_all(folder)?;
            run(Command::new("cp").arg("-r").arg(file).arg(folder))?;
        }
    }
    run(Command::new("depmod").arg("-b").arg(root).arg(&image.release))
}

fn write_init(root: &Path, myself: &Path, agent: &Path, object: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let script = format!(
        "#!{shell}
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t bpf bpf /sys/fs/bpf
mount -t devtmpfs dev /dev
for module in {LOADED}; do modprobe $module; done
ip link set lo up
export PROXIER_AGENT='{agent}' PROXIER_BPF_OBJECT='{object}'
'{myself}' kernels --inside > /dev/ttyS1
# Restart at once, which is the end of a machine that may not.
echo b > /proc/sysrq-trigger
",
        shell = which("sh").context("sh is not in PATH")?.display(),
        agent = agent.display(),
        object = object.display(),
        myself = myself.display(),
    );
    let init = root.join("init");
    fs::write(&init, script).with_context(|| format!("{}: cannot be written", init.display()))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("the machine's first program")
}

fn pack(root: &Path, archive: &Path) -> Result<()> {
    let script = "cd \"$1\" && find . | cpio --create --format=newc --owner=0:0 --quiet > \"$2\"";
    run(Command::new("sh").args(["-c", script, "sh"]).arg(root).arg(archive))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found_and_what_the_kernel_provides_is_not() {
        let list = "\tlinux-vdso.so.1 (0x00007ffd2)
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries_in(list), expected);
        assert_eq!(libraries_in("\tnot a dynamic executable\n"), Vec::<PathBuf>::new());
    }
}
