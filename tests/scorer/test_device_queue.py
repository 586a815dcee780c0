"""One device for several threads."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scorer.alm import BidirectionalALM
from scorer.device_queue import DeviceQueue
from scorer.errors import ScoringError
from scorer.scoring import score_nll


def make_model(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()


def make_alm():
    return BidirectionalALM(make_model(0), make_model(1))


def make_ids(rows, seed, dtype=np.uint16):
    return np.random.default_rng(seed).integers(0, 299, (rows, 32)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_every_thread_gets_the_scores_of_its_own_blocks(dtype):
    alm = make_alm()
    queue = DeviceQueue(alm, micro_batch=4)
    asked = [make_ids(rows, seed, dtype) for seed, rows in enumerate([3, 1, 8, 5, 0, 2, 7, 4] * 3)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(queue.score, asked))
    for ids, found in zip(asked, answers, strict=True):
        for direction, expected in zip(found, score_nll(alm, torch.from_numpy(ids.astype(np.int64))), strict=True):
            assert direction.dtype == np.float32
            np.testing.assert_array_equal(direction, expected.numpy())


def test_one_thread_alone_speaks_to_the_device():
    alm, threads = make_alm(), set()
    for model in (alm.left_to_right, alm.right_to_left):
        model.transformer.register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    queue = DeviceQueue(alm, micro_batch=4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(queue.score, [make_ids(2, seed) for seed in range(12)]))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_broken_model_is_an_error_for_whoever_asked_and_the_queue_goes_on():
    alm = make_alm()
    queue = DeviceQueue(alm, micro_batch=4)
    with torch.no_grad():
        alm.right_to_left.transformer.wte.weight[7] = math.nan
    broken, sound = make_ids(2, 1), make_ids(2, 2)
    broken[1, 5], sound[sound == 7] = 7, 8
    with pytest.raises(ScoringError, match="NaN or infinity"):
        queue.score(broken)
    with pytest.raises(ScoringError, match="NaN or infinity"):
        queue.score(sound)  # its output layer is tied to the embedding
    with torch.no_grad():
        alm.right_to_left.transformer.wte.weight[7] = 0.0
    assert np.isfinite(queue.score(broken)[0][:, 1:]).all()
