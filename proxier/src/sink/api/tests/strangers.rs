//! Who connects and is no client, or a bad one, disturbs nobody and is let go.

use std::{io, net::SocketAddr};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    net::TcpStream,
    task::yield_now,
};

use super::*;
use crate::sink::api::server::{Connection, GREETING};

/// What every HTTP/2 client begins with, and its settings: none.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const NO_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
/// The beginning of TLS.
const CLIENT_HELLO: &[u8] = &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03];

fn address(world: &World) -> SocketAddr {
    let ListenAddress::Tcp(address) = *world.sink.bound() else { panic!("{:?}", world.sink) };
    address
}

async fn is_let_go(stranger: &mut TcpStream) {
    let mut rest = Vec::new();
    match timeout(PATIENCE, stranger.read_to_end(&mut rest)).await.expect("it is kept") {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
    }
}

#[tokio::test]
async fn strangers_are_let_go_and_disturb_nobody() {
    let mut world = World::new();
    world.put([web()]);
    let mut watch = world.watch("node1").await;
    watch.next().await;

    let frame_of_a_stream_that_is_not_there = [NO_SETTINGS, &[0, 0, 1, 0, 0, 0, 0, 0, 7, 0]].concat();
    let endless_frame = [0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1];
    for (n, words) in [
        (1, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
        (2, CLIENT_HELLO.to_vec()),
        (3, vec![0xff; 100_000]),
        (4, vec![0; 64]),
        (5, [&PREFACE[..16], b"garbage!"].concat()),
        (6, [PREFACE, b"garbage that is no frame"].concat()),
        (7, [PREFACE, &frame_of_a_stream_that_is_not_there].concat()),
        (8, [PREFACE, NO_SETTINGS, &endless_frame].concat()),
    ] {
        let mut stranger = TcpStream::connect(address(&world)).await.unwrap();
        // Whom the server leaves in the midst of a word, the kernel tells by RST.
        let _ = stranger.write_all(&words).await;
        is_let_go(&mut stranger).await;

        // And one who says the same and goes by RST.
        let mut stranger = TcpStream::connect(address(&world)).await.unwrap();
        let _ = stranger.write_all(&words[..words.len() / 2]).await;
        SockRef::from(&stranger).set_linger(Some(Duration::ZERO)).unwrap();
        drop(stranger);

        world.put([mk_service("web", [&*format!("10.0.1.{n}")]).into()]);
        assert_eq!(watch.next().await, ["set default/web", "sync"], "{n}");
    }
    assert_eq!(world.watch("node1").await.next().await, ["reset", "set default/web", "sync"]);
    world.until_metric("proxier_api_clients", 1).await;
}

#[tokio::test]
async fn a_call_that_there_is_not_is_said_to_be_none() {
    let world = World::new();
    let mut grpc = tonic::client::Grpc::new(world.channel());
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<WatchReq, OpItem>::default();
    let path = http::uri::PathAndQuery::from_static("/global.Sets/Watch");
    let called = grpc.unary(tonic::Request::new(WatchReq::default()), path, codec).await;
    assert_eq!(called.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test]
async fn what_is_no_request_is_refused_with_a_reason() {
    let mut world = World::new();
    world.put([web()]);
    // The name's field with a length beyond the message.
    let (requests, stream) = mpsc::channel(1);
    let mut grpc = tonic::client::Grpc::new(world.channel());
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<NotARequest, OpItem>::default();
    let path = http::uri::PathAndQuery::from_static("/localv1.Sets/Watch");
    let call = tonic::Request::new(ReceiverStream::new(stream));
    let mut steps = grpc.streaming(call, path, codec).await.unwrap().into_inner();
    requests.send(NotARequest { node_name: 7 }).await.unwrap();
    let status = steps.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status}");
    assert!(status.message().contains("node_name"), "{status}");
    world.until_metric("proxier_api_clients", 0).await;
}

/// With a number where the name is.
#[derive(Clone, PartialEq, prost::Message)]
struct NotARequest {
    #[prost(uint32, tag = "1")]
    node_name: u32,
}

async fn connected() -> (DuplexStream, Connection) {
    let (client, server) = duplex(1024);
    let place = Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().unwrap();
    (client, Connection::new(Box::new(server), place))
}

#[tokio::test(start_paused = true)]
async fn who_does_not_say_the_first_words_in_time_is_let_go_however_slowly_they_come() {
    for words in [&PREFACE[..0], &PREFACE[..1], &PREFACE[..23]] {
        let (mut client, mut connection) = connected().await;
        let start = Instant::now();
        let server = tokio::spawn(async move {
            let mut buffer = Vec::new();
            let ended = connection.read_to_end(&mut buffer).await.map_err(|error| error.kind());
            (ended, start.elapsed())
        });
        for word in words {
            client.write_all(&[*word]).await.unwrap();
            sleep(GREETING / 25).await;
        }
        let (ended, after) = server.await.unwrap();
        assert_eq!(ended, Err(io::ErrorKind::TimedOut), "after {} bytes", words.len());
        assert!(after >= GREETING && after < GREETING * 2, "{after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_has_said_them_may_take_its_time() {
    let (mut client, mut connection) = connected().await;
    client.write_all(PREFACE).await.unwrap();
    let mut first = [0; PREFACE.len()];
    connection.read_exact(&mut first).await.unwrap();
    let server = tokio::spawn(async move { connection.read_u8().await });
    yield_now().await;
    sleep(GREETING * 100).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(server.await.unwrap().unwrap(), b'x');
}
