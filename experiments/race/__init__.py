"""Race synchronous and asynchronous rules to an accuracy, simulated: ``python -m experiments.race --root DIRECTORY``.

Fashion-MNIST, MLP 784-128-10, batches of 64, 8 epochs, constant learning rate, momentum 0.9; K = 4, 16, 64 virtual workers that
differ in speed in five ways. A gradient takes 0.1 virtual seconds where nothing slows it down; network and server take no time.

Tuning is the same for every variant of every contender in every cell (K and setting): each rate of one geometric grid is run
with the same tuning seeds, none of which is reported, and judged on a tenth of the training samples, which each seed holds
out. Of the rates with which all of these seeds reach the tuning target, the one with the shortest mean time is chosen; where
there is none, the one with the highest last accuracy. While the chosen rate is at an edge of the grid, the next rate beyond is
tried too. A contender with variants, such as the m of m-synchronous SGD, gets this for each of them, and enters with the best:
its budget is a multiple of the others', which the table tells. Runs of a rate that cannot win any more are cut off, which
changes no choice.

What is reported is of the test split, of other seeds, with the chosen rate: the time at which the mean of three evaluations in
a row reaches each target, and the mean of the last three. The grid is in the rate of a step with the mean of K gradients; a
rule that adds each gradient gets the K-th part.

The updates of a synchronous rule do not depend on the speeds. So its accuracy is simulated once for each rate and seed, and the
times of its rounds are drawn for each setting from the very numbers that the simulator would draw (`experiments.race.clocks`).
Rounds of the first m of K workers are simulated as rounds of m workers: each has m gradients of samples not used before.

Finished runs are kept in a folder (``--store``) and not run again, unless the source of their rule has changed. Earlier results
(``--into``), perhaps of another machine, count as well, without their runs: what they lack is run. Where their job or a rule
has changed since, the command says so, and leaves such rows out with ``--replace``. Writes ``results/race.json`` and ``.md``,
and ``docs/race.png``; ``--report`` makes the latter two from the first, and runs nothing.
``--long`` is another job, for what 64 workers can reach at all: 16 epochs, ``results/race_long.json`` and ``.md``. So is
``--momentum``, in which ``train.momentum`` of every contender is tuned as well: ``results/race_momentum.json`` and ``.md``.
"""
