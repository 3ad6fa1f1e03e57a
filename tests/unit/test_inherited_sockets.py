"""What a forked worker lets go of, and what it keeps, of the sockets of the process that forked it."""

import multiprocessing
import os
import socket

import pytest

from vllm_cfg_plugin.compat.forks import release_inherited_listeners


@pytest.fixture
def sockets():
    """Name -> socket."""
    with socket.socket() as bound, socket.socket() as listening, socket.socket() as unbound:
        for server in (bound, listening):
            server.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()) as connected:
            accepted, _ = listening.accept()
            with accepted:
                yield {
                    "bound": bound,
                    "listening": listening,
                    "unbound": unbound,
                    "connected": connected,
                    "accepted": accepted,
                }


def released(pipe, descriptors):
    release_inherited_listeners()
    pipe.send({name for name, fd in descriptors.items() if os.readlink(f"/proc/self/fd/{fd}") == os.devnull})


def test_servers_are_released_also_before_they_listen(sockets):
    ours, theirs = multiprocessing.Pipe()
    descriptors = {name: sock.fileno() for name, sock in sockets.items()}
    multiprocessing.get_context("fork").Process(target=released, args=(theirs, descriptors)).start()
    assert ours.recv() == {"bound", "listening"}
