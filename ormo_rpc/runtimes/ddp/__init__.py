"""The runtime of torch's DistributedDataParallel: K ranks, no server, the same tickets and records as other runtimes.

It is what a user would take instead of a parameter server, as an opponent that asynchronous runs are compared with::

    launcher.py      starts the ranks of this machine, and ends all of them when one has died
    rank_process.py  one rank: the process group, then round after round
    rounds.py        the samples of each rank in a round
    trainer.py       a rank's model under DistributedDataParallel, its passes, and torch.optim.SGD
    slowdown.py      ranks that are slower than their machine
    meeting.py       the few numbers that ranks tell one another beside gradients
    recording.py     rank 0: trace, metrics, evaluations and summary, by the `Session` of every runtime

Departures from a worker of the other runtimes: ``train.clip_norm`` clips the mean of a round's gradients, as
``torch.nn.utils.clip_grad_norm_`` behind ``backward`` does, not each worker's own; buffers are those of rank 0, which
DistributedDataParallel sends to all ranks before each pass; the last batch of an epoch, where it is smaller, counts with
``runtime.shares=proportional`` as its number of samples, otherwise as any other.
"""
