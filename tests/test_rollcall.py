"""The roll call: nobody is taken for process 0 but process 0."""

import json
import socket
import threading

from llmjax.rollcall import roll_call


def test_what_gives_back_what_was_written_to_it_is_not_process_0():
    """A connection to a port on which nobody listens yet may be one to itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard = []

        def answers():
            for answer in (lambda said: said, lambda said: b"200 OK\n", lambda said: b'{"come": 2}\n'):
                peer, _ = listener.accept()
                with peer:
                    heard.append(said := peer.recv(4096))
                    peer.sendall(answer(said))

        server = threading.Thread(target=answers)
        server.start()
        roll_call(f"127.0.0.1:{listener.getsockname()[1]}", count=2, index=1, seconds=20)
        server.join()
    assert [json.loads(said) for said in heard] == [dict(index=1, count=2)] * 3
