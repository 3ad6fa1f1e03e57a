"""On a GPU: what a call that is ended frees is not used again before all that reads it."""

import torch

from vllm_cfg_plugin.pipelines.any_pipeline.call_thread import CallThread, _Stage


class Stream:
    def __init__(self):
        self.waited_for = []

    def wait_stream(self, stream):
        self.waited_for.append(stream)


def test_streams_that_a_closed_call_ran_on_wait_for_its_last_one(monkeypatch):
    encodes, steps = Stream(), Stream()
    current, ran_on = [encodes], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", ran_on.append)
    thread = CallThread(lambda: pipeline, {}, 9, torch.device("cuda:0"))

    def pipeline():
        while True:
            thread._pause(_Stage.PREDICTIONS)

    for current[0] in (encodes, steps, steps):
        thread.resume()
    assert ran_on == [encodes, steps, steps]
    assert (encodes.waited_for, steps.waited_for) == ([], []), "an encode does not wait for steps"
    thread.close()
    assert (encodes.waited_for, steps.waited_for) == ([steps], [])
    thread._thread.join(5)
    assert thread.has_ended
