//! Where the API is served: a TCP port, or a unix socket whose permissions say who may connect.

use std::{
    fmt, fs,
    io::{self, ErrorKind},
    net::{Ipv6Addr, SocketAddr},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, fchmod},
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::observe::listen::listener;

const TCP: &str = "tcp://";
const UNIX: &str = "unix://";
/// Those of the socket: owner and group may connect.
const SOCKET_MODE: u32 = 0o660;
/// Those of its directory: a socket that is being made is nobody else's business either.
const DIRECTORY_MODE: u32 = 0o750;
const BACKLOG: i32 = 128;
/// Between two attempts to have an address that is taken.
pub(super) const AGAIN: Duration = Duration::from_secs(5);

/// An address to serve the API on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A port. An unspecified IPv6 address stands for every address of both families.
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// What is no [`ListenAddress`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not an address to listen on: write tcp://127.0.0.1:12090, tcp://[::1]:12090, tcp://:12090 for every address, or \
     unix:///run/proxier/api.sock"
)]
pub struct NotAListenAddress;

impl FromStr for ListenAddress {
    type Err = NotAListenAddress;

    fn from_str(text: &str) -> Result<Self, NotAListenAddress> {
        let text = text.trim();
        if let Some(path) = text.strip_prefix(UNIX) {
            let path = PathBuf::from(path);
            return if path.is_absolute() && path.file_name().is_some() {
                Ok(Self::Unix(path))
            } else {
                Err(NotAListenAddress)
            };
        }
        let address = text.strip_prefix(TCP).unwrap_or(text);
        if let Some(port) = address.strip_prefix(':') {
            let port = port.parse().map_err(|_| NotAListenAddress)?;
            return Ok(Self::Tcp((Ipv6Addr::UNSPECIFIED, port).into()));
        }
        address.parse().map(Self::Tcp).map_err(|_| NotAListenAddress)
    }
}

impl ListenAddress {
    /// Whether anybody but processes of this machine can reach it.
    pub(super) fn is_exposed(&self) -> bool {
        match self {
            Self::Tcp(address) => !address.ip().to_canonical().is_loopback(),
            Self::Unix(_) => false,
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{TCP}{address}"),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener, SocketAddr),
    Unix(UnixListener, PathBuf),
}

/// A connection of either kind.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    pub(super) fn bind(address: &ListenAddress) -> anyhow::Result<Self> {
        match address {
            ListenAddress::Tcp(address) => {
                let listener = listener(*address).map_err(|error| {
                    let next = next_step(&error);
                    anyhow::Error::new(error).context(format!("cannot listen on {TCP}{address}: {next}"))
                })?;
                let bound = listener.local_addr()?;
                Ok(Self::Tcp(listener, bound))
            }
            ListenAddress::Unix(path) => {
                let listener =
                    bind_unix(path).with_context(|| format!("cannot listen on {UNIX}{}", path.display()))?;
                Ok(Self::Unix(listener, path.clone()))
            }
        }
    }

    pub(super) fn bound(&self) -> ListenAddress {
        match self {
            Self::Tcp(_, address) => ListenAddress::Tcp(*address),
            Self::Unix(_, path) => ListenAddress::Unix(path.clone()),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener, _) => {
                let (stream, _) = listener.accept().await?;
                // The end of a batch is sent when it is there, not with the next. A connection that is gone will say so.
                let _ = stream.set_nodelay(true);
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener, _) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

fn next_step(error: &io::Error) -> &'static str {
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::AddrInUse, _) => {
            "see who has the port with `ss -ltnp`, and end that, or listen elsewhere"
        }
        (ErrorKind::AddrNotAvailable, _) => {
            "see which addresses this machine has with `ip address`, and give one of them"
        }
        (ErrorKind::PermissionDenied, _) => "give a port above 1023, or the capability NET_BIND_SERVICE",
        (_, Some(libc::EAFNOSUPPORT)) => {
            "the kernel has no IPv6: give an IPv4 address, such as tcp://0.0.0.0:12090 for all of them"
        }
        _ => "see the reason, or listen elsewhere",
    }
}

/// Whether somebody listens at a unix socket.
fn is_served(place: &Path) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Somebody who has as many connections waiting as there may be might never take another.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(place)?) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes the socket under another name and then gives it its own: who connects finds the former one or this, whole and with its
/// permissions, and never what a link points to.
fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("no path of a file: write one such as {UNIX}/run/proxier/api.sock");
    };
    let directory = Directory::open(directory)?;
    let place = directory.path().join(name);
    match fs::symlink_metadata(&place) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
        Ok(metadata) if metadata.file_type().is_symlink() => {
            bail!("it is a symbolic link, which is not followed: remove it, or name what it points to")
        }
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("there is a file, which is not touched: remove it, or give another path")
        }
        Ok(_) => {
            if is_served(&place).context("the socket that is there cannot be tried")? {
                bail!(
                    "somebody serves there already: see who with `ss -lxp`, and end that, or give another path"
                );
            }
        }
    }
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}", std::process::id()));
    let temporary = directory.path().join(temporary);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    // From the start nobody else may connect, whatever the umask says.
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    fchmod(&socket, Mode::from_bits_truncate(SOCKET_MODE))?;
    socket.bind(&SockAddr::unix(&temporary)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    let listener = UnixListener::from_std(socket.into())?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(SOCKET_MODE))
        .and_then(|()| fs::rename(&temporary, &place))
        .inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    Ok(listener)
}

/// A directory that stays the same one, whatever becomes of its name.
struct Directory(OwnedFd);

impl Directory {
    /// Opens it; makes it if it is not there.
    fn open(path: &Path) -> anyhow::Result<Self> {
        let made = match fs::DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("the directory {} cannot be made: make it, or mount it", path.display())
                });
            }
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory =
            open(path, flags, Mode::empty()).map(Self).map_err(io::Error::from).with_context(|| {
                format!("{} is no directory (a symbolic link to one is not followed)", path.display())
            })?;
        if made {
            // Whatever the umask says.
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(DIRECTORY_MODE))?;
        }
        let mode = fs::metadata(directory.path())?.mode();
        if mode & libc::S_IWOTH != 0 && mode & libc::S_ISVTX == 0 {
            bail!(
                "anybody may replace what is in {}: take the others' write permission away",
                path.display()
            );
        }
        Ok(directory)
    }

    fn path(&self) -> PathBuf {
        // Short as well: an address of a unix socket has 107 bytes.
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixStream as BlockingUnixStream};

    use super::*;

    fn unix(path: &Path) -> ListenAddress {
        ListenAddress::Unix(path.to_owned())
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    fn refused(path: &Path) -> String {
        format!("{:#}", Listener::bind(&unix(path)).unwrap_err())
    }

    #[test]
    fn an_address_is_read_as_kpng_writes_it_and_as_it_is_printed() {
        for (text, printed) in [
            ("tcp://127.0.0.1:12090", "tcp://127.0.0.1:12090"),
            ("tcp://:12090", "tcp://[::]:12090"),
            ("[::1]:1", "tcp://[::1]:1"),
            ("unix:///run/proxier/api.sock", "unix:///run/proxier/api.sock"),
        ] {
            let address: ListenAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), printed);
            assert_eq!(printed.parse(), Ok(address));
        }
        for text in [
            "",
            "tcp://",
            "tcp://localhost:1",
            "unix://run/x",
            "unix:///",
            "127.0.0.1",
            "tcp://:x",
            "http://[::]:1",
        ] {
            assert_eq!(text.parse::<ListenAddress>(), Err(NotAListenAddress), "{text:?}");
        }
    }

    #[tokio::test]
    async fn owner_and_group_may_connect_and_the_directory_is_theirs() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("proxier/api.sock");
        let listener = Listener::bind(&unix(&path)).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (SOCKET_MODE, DIRECTORY_MODE));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left");
        BlockingUnixStream::connect(&path).unwrap();
        listener.accept().await.unwrap();
    }

    #[tokio::test]
    async fn a_socket_without_a_listener_is_replaced_and_one_with_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("api.sock");
        let former = Listener::bind(&unix(&path)).unwrap();
        assert!(refused(&path).contains("somebody serves there already"), "{}", refused(&path));
        drop(former);
        assert!(path.exists(), "as a killed process leaves it");
        let _listener = Listener::bind(&unix(&path)).unwrap();
        BlockingUnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn no_link_is_followed_and_no_file_touched() {
        let parent = tempfile::tempdir().unwrap();
        let elsewhere = parent.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let link = parent.path().join("link");
        symlink(&elsewhere, &link).unwrap();
        assert!(
            refused(&link.join("api.sock")).contains("no directory"),
            "{}",
            refused(&link.join("api.sock"))
        );

        for target in ["elsewhere/api.sock", "nowhere"] {
            let path = parent.path().join("api.sock");
            symlink(parent.path().join(target), &path).unwrap();
            assert!(refused(&path).contains("symbolic link"), "{}", refused(&path));
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);

        let file = parent.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(refused(&file).contains("there is a file"), "{}", refused(&file));
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_directory_in_which_anybody_can_replace_the_socket_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let open = parent.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(refused(&open.join("api.sock")).contains("anybody may replace"));
        fs::set_permissions(&open, fs::Permissions::from_mode(0o1777)).unwrap();
        Listener::bind(&unix(&open.join("api.sock"))).unwrap();
    }

    #[tokio::test]
    async fn a_long_path_is_no_obstacle() {
        let parent = tempfile::tempdir().unwrap();
        let deep = parent.path().join("d".repeat(120));
        let _listener = Listener::bind(&unix(&deep.join("api.sock"))).unwrap();
        assert!(deep.join("api.sock").exists());
    }

    #[tokio::test]
    async fn somebody_who_takes_no_connections_is_somebody_and_is_not_waited_for() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("api.sock");
        let busy = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        busy.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        busy.listen(0).unwrap();
        let waiting = BlockingUnixStream::connect(&path).unwrap();
        assert!(refused(&path).contains("somebody serves there already"), "{}", refused(&path));
        drop(waiting);
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_had_is_said_with_what_to_do() {
        let taken = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        // Kept for documentation: no machine has it.
        for (address, step) in [(taken.bound(), "ss -ltnp"), ("192.0.2.1:0".parse().unwrap(), "ip address")] {
            let error = format!("{:#}", Listener::bind(&address).unwrap_err());
            assert!(error.contains(&address.to_string()) && error.contains(step), "{error}");
        }
    }
}
