"""The `answers` benchmark: data, baselines, metrics, training and its checkpoints, pictures, command line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("bm25s")
pytest.importorskip("chatterbot_corpus")

from typer.testing import CliRunner

from gatematch.bench.__main__ import app
from gatematch.bench.answers import train
from gatematch.bench.answers.abcnn import ABCNNMatcher, ABCNNSettings
from gatematch.bench.answers.baselines import BM25, random_scores
from gatematch.bench.answers.batches import Encoder
from gatematch.bench.answers.data import CandidateList, Dataset, chatterbot, read_corpus
from gatematch.bench.answers.metrics import evaluate
from gatematch.bench.answers.model import MatcherSettings, Settings, ours, peer
from gatematch.bench.answers.models import TITLES, Build, builders
from gatematch.bench.answers.overlap import Blend, overlap_features
from gatematch.bench.answers.report import Run, models_table, result_rows
from gatematch.bench.answers.text import MAX_LENGTH, UNKNOWN, Vocabulary, identity, tokenize
from gatematch.bench.answers.tsv import tsv
from gatematch.bench.plots import draw

TINY = MatcherSettings(embedding=8, hidden=4, features=3, wrong=2, batch=4)
CPU = torch.device("cpu")
SUBJECTS = ["rivers", "bread", "violins", "comets", "chess", "bees", "glass", "trains", "salt", "maps"]


@pytest.fixture(scope="module")
def corpus() -> Dataset:
    return chatterbot()


def toy_tsv(path: Path, subjects: list[str] = SUBJECTS) -> Path:
    """Each subject's question with its right answer and those of the next two."""
    rows = ["question_id\tquestion\tanswer\tlabel"]
    for number, subject in enumerate(subjects):
        for step in range(3):
            other = subjects[(number + step) % len(subjects)]
            rows.append(f"q{number}\twhat about {subject}?\tabout {other} number {step}\t{int(step == 0)}")
    path.write_text("\n".join(rows) + "\n")
    return path


def tiny(model: str) -> Settings:
    if model == "lstm":
        return TINY
    return ABCNNSettings(model, embedding=8, channels=4, wrong=2, batch=4)


def trainer(dataset: Dataset, settings: Settings = TINY, build: Build = ours) -> train.Trainer:
    vocabulary = Vocabulary(dataset.train_texts)
    lists = (*dataset.train, *dataset.dev, *dataset.test)
    encoder = Encoder(vocabulary, [text for item in lists for text in (item.question, *item.candidates)])
    return train.Trainer(build, vocabulary.pieces, settings, encoder, dataset, CPU)


@pytest.fixture
def toy(tmp_path: Path) -> Dataset:
    return tsv(toy_tsv(tmp_path / "toy.tsv"))


# Data


def test_threads_repeated_in_the_corpus_count_once(corpus: Dataset) -> None:
    assert corpus.counts["pairs"] < 900 < corpus.counts["threads"]
    assert corpus.counts["malformed"] == 1
    assert sum(len(split) for split in (corpus.train, corpus.dev, corpus.test)) == corpus.counts["questions"]


def test_no_question_is_in_two_splits_or_twice_in_one(corpus: Dataset) -> None:
    questions = [identity(item.question) for item in (*corpus.train, *corpus.dev, *corpus.test)]
    assert len(questions) == len(set(questions))


def test_lists_have_one_right_and_nineteen_other_wrong_answers(corpus: Dataset) -> None:
    for item in (*corpus.dev, *corpus.test):
        assert len(item.candidates) == 20 and sum(item.labels) == 1
    for item in (*corpus.train, *corpus.dev, *corpus.test):
        assert len({identity(text) for text in item.candidates}) == len(item.candidates)


def test_no_wrong_candidate_is_right_for_the_same_question(corpus: Dataset) -> None:
    right: dict[str, set[str]] = {}
    for _, question, answer in read_corpus()[0]:
        right.setdefault(identity(question), set()).add(identity(answer))
    for item in (*corpus.train, *corpus.dev, *corpus.test):
        assert not {identity(text) for text in item.wrong} & right[identity(item.question)]


def test_wrong_answers_of_dev_and_test_come_from_their_own_split(corpus: Dataset) -> None:
    """Else a model could tell a wrong answer by having been trained on it."""
    for split in (corpus.dev, corpus.test):
        questions = {identity(item.question) for item in split}
        own = {identity(a) for _, q, a in read_corpus()[0] if identity(q) in questions}
        assert all(identity(text) in own for item in split for text in item.candidates)


def test_wrong_answers_are_of_the_questions_category_as_far_as_they_go(corpus: Dataset) -> None:
    threads = [(category, identity(q), identity(a)) for category, q, a in read_corpus()[0]]
    category_of: dict[str, str] = {}
    for category, question, _ in threads:
        category_of.setdefault(question, category)
    for split in (corpus.train, corpus.dev, corpus.test):
        questions = {identity(item.question) for item in split}
        for item in split:
            asked, wrong = identity(item.question), {identity(text) for text in item.wrong}
            kin = {a for _, q, a in threads if q in questions and category_of[q] == category_of[asked]}
            kin -= {a for _, q, a in threads if q == asked}
            assert wrong <= kin or kin < wrong


def test_the_right_answer_has_no_favourite_place(corpus: Dataset) -> None:
    places = [item.labels.index(True) for item in corpus.test]
    assert set(places) == set(range(20))
    assert 8 < sum(places) / len(places) < 11


def test_data_are_the_same_every_time(corpus: Dataset) -> None:
    assert chatterbot() == corpus
    assert chatterbot(split_seed=1).test != corpus.test


def test_tokens() -> None:
    assert tokenize("Don’t PAY $1,000.50 --- at 10:30!!") == [
        "don't",
        "pay",
        "$",
        "1,000.50",
        "-",
        "at",
        "10:30",
        "!",
    ]
    assert tokenize("snake_case") == ["snake", "_", "case"]


def test_unknown_words_are_spelled_alike_wherever_they_stand() -> None:
    vocabulary = Vocabulary(["robots think", "robots sing"])
    unknown, known = vocabulary.spell("robotic"), vocabulary.spell("robots")
    assert unknown[0] == UNKNOWN and known[0] not in (UNKNOWN, *unknown)
    assert len(set(unknown) & set(known)) >= 5  # <ro rob obo bot <rob robo obot
    assert max(unknown + known) < vocabulary.pieces
    assert vocabulary.idf("robotic") > vocabulary.idf("sing") > vocabulary.idf("robots") == 0


def test_long_texts_are_cut_and_batches_padded() -> None:
    long = " ".join(f"w{n}" for n in range(60))
    encoder = Encoder(Vocabulary([long, "one two"]), [long, "one two"])
    batch = encoder.batch(["one two"], [["one two", long]], CPU)
    assert batch.answers.tokens.shape == (2, MAX_LENGTH) and batch.answers.lengths.tolist() == [2, MAX_LENGTH]
    assert batch.questions.tokens.shape == (1, 2) and batch.question_of.tolist() == [0, 0]
    assert (batch.answers.weights[0, 2:] == 0).all()


def test_tsv_is_split_by_question_and_skips_what_cannot_be_ranked(tmp_path: Path) -> None:
    path = toy_tsv(tmp_path / "toy.tsv")
    with path.open("a") as file:
        file.write("all\tonly right?\tyes\t1\n" + "none\tonly wrong?\tno\t0\n")
        file.write("again\tWhat about   BEES?\tthey hum\t1\nagain\twhat about bees?\tthey bark\t0\n")
    data = tsv(path)
    assert data.counts["without a right or a wrong answer"] == 2
    splits = [{identity(item.question) for item in split} for split in (data.train, data.dev, data.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 10
    assert sum(map(len, (data.train, data.dev, data.test))) == 11


def test_a_question_of_the_test_file_is_taken_out_of_training(tmp_path: Path) -> None:
    path = toy_tsv(tmp_path / "toy.tsv")
    test = toy_tsv(tmp_path / "test.tsv", SUBJECTS[:3])
    data = tsv(path, test=test)
    assert len(data.test) == 3 and data.counts["already in dev or test"] >= 1
    assert not {item.question for item in data.test} & {item.question for item in (*data.train, *data.dev)}


def test_an_answer_that_is_right_once_is_never_wrong_in_its_list(tmp_path: Path) -> None:
    path = toy_tsv(tmp_path / "toy.tsv")
    with path.open("a") as file:
        file.write("q0\twhat about rivers?\tAbout  RIVERS number 0!\t0\n")
    data = tsv(path)
    (item,) = (i for i in (*data.train, *data.dev, *data.test) if i.question == "what about rivers?")
    assert sum(item.labels) == 1 and len(item.candidates) == 3


HEADER = "question_id\tquestion\tanswer\tlabel\n"
WRONG_FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "no column": ("question_id\tquestion\tanswer\n", ["line 1", "label", "question_id, question, answer"]),
    "empty": ("", ["line 1", "question_id", "nothing"]),
    "only a header": (HEADER, ["answer in every line", "got none"]),
    "label": (HEADER + "1\tq\ta\tyes\n", ["line 2", "0 or 1", "'yes'"]),
    "columns": (HEADER + "1\tq\ta\n", ["line 2", "4 columns", "got 3"]),
    "no text": (HEADER + "1\t \ta\t1\n", ["line 2", "question", "nothing"]),
    "two questions": (HEADER + "1\tq\ta\t1\n1\tr\tb\t0\n", ["line 3", "line 2", "'r'"]),
    "nothing right": (HEADER + "1\tq\ta\t0\n", ["right and a wrong answer", "got none"]),
    "encoding": (b"question_id\tquestion\xff", ["UTF-8", "byte 20"]),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_tsv_is_one_sentence_and_exit_code_2(name: str, tmp_path: Path) -> None:
    content, parts = WRONG_FILES[name]
    path = tmp_path / "data.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(app, ["answers", "--data", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output
    assert all(part in result.stderr for part in ["data.tsv", *parts])


# Metrics and baselines


def test_metrics_by_hand() -> None:
    # Right at ranks 1 and 3 of 4; right at rank 2 of 3.
    result = evaluate([[4, 3, 2, 1], [1, 3, 2]], [[True, False, True, False], [False, False, True]])
    assert result.map == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert result.mrr == pytest.approx((1 + 1 / 2) / 2)
    assert result.accuracy == 1 / 2


def test_ties_are_worth_their_mean_over_all_orders() -> None:
    labels = [True, False, True, False]
    orders = [
        evaluate([[-float(order.index(n)) for n in range(4)]], [labels]) for order in permutations(range(4))
    ]
    tied = evaluate([[1.0] * 4], [labels])
    for measure in ("map", "mrr", "accuracy"):
        mean = sum(getattr(order, measure) for order in orders) / len(orders)
        assert getattr(tied, measure) == pytest.approx(mean), measure
    # A better wrong one first, then a tie of a right and a wrong one: rank 2 or 3.
    behind = evaluate([[2, 1, 1]], [[False, True, False]])
    assert behind.map == behind.mrr == pytest.approx((1 / 2 + 1 / 3) / 2) and behind.accuracy == 0


def test_random_order_is_the_harmonic_mean_rank(corpus: Dataset) -> None:
    result = evaluate(random_scores(corpus.test), [item.labels for item in corpus.test])
    assert result.map == pytest.approx(sum(1 / rank for rank in range(1, 21)) / 20)
    assert result.accuracy == pytest.approx(1 / 20)


def test_bm25_prefers_the_rare_shared_word() -> None:
    item = CandidateList("where is the comet", ("the dog is here", "a comet", "no"), (False, True, False))
    others = ["the cat is there", "the end is near", "it is the sea"]
    ((dog, comet, nothing),) = BM25([*item.candidates, *others]).scores([item])
    assert comet > dog > nothing == 0
    assert BM25(list(item.candidates)).scores([dataclasses.replace(item, question="zzz")]) == [[0.0] * 3]


def test_overlap_features() -> None:
    vocabulary = Vocabulary(["what is a comet", "a comet is ice", "a dog"])
    shared, idf, asked, answered = overlap_features(vocabulary, "What is a comet?", "A comet is a thing!")
    assert shared == 1  # "is" and "a" are stop words
    assert idf == pytest.approx(vocabulary.idf("comet") + vocabulary.idf("is") + vocabulary.idf("a"))
    assert (asked, answered) == pytest.approx((torch.tensor([5.0, 6.0]).log()).tolist())


def test_blend_learns_which_evidence_ranks() -> None:
    names = ["comet", "violin", "glass", "bread"]
    lists = [
        CandidateList(f"what is {name}", tuple(f"{n} it is" for n in names), tuple(n == name for n in names))
        for name in names
    ]
    noise = [[0.3, 0.1, 0.2, 0.4]] * 4
    blend = Blend(Vocabulary(["what is it"])).fit(lists, noise)
    assert evaluate(blend.scores(lists, noise), [item.labels for item in lists]).map == 1
    assert blend.weights["shared words"] > abs(blend.weights["model score"])


# Training


def test_ours_and_peer_learn_the_same_from_the_same_batches(corpus: Dataset) -> None:
    settings = dataclasses.replace(TINY, embedding=16, hidden=8)
    small = dataclasses.replace(corpus, train=corpus.train[:24], dev=corpus.dev[:4], test=[])
    one, other = trainer(small, settings), trainer(small, settings, peer)
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name], rtol=0, atol=0)
    for _ in range(2):
        one.epoch()
        other.epoch()
    assert one.losses == pytest.approx(other.losses, abs=1e-5)


@pytest.mark.parametrize("model", TITLES)
def test_scores_do_not_depend_on_padding_or_company(model: str, toy: Dataset) -> None:
    run = trainer(toy, tiny(model), builders(tiny(model))["ours"])
    together = run.scores(toy.train)
    alone = [run.scores([item])[0] for item in toy.train]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", TITLES)
def test_training_lowers_the_loss_and_repeats_under_its_seed(model: str, corpus: Dataset) -> None:
    small = dataclasses.replace(corpus, train=corpus.train[:16], dev=corpus.dev[:4], test=corpus.test[:4])
    quick = dataclasses.replace(tiny(model), embedding=16, forget_words=0.0, learning_rate=1e-2)
    settings = [quick, quick, dataclasses.replace(quick, seed=1)]
    first, second, other = (trainer(small, one, builders(one)["ours"]) for one in settings)
    for run in (first, second, other):
        for _ in range(3):
            run.epoch()
    assert first.losses == second.losses != other.losses
    assert first.scores(small.test) == second.scores(small.test)
    assert first.losses[-1] < first.losses[0]


def test_an_abcnn_scores_by_its_similarities(toy: Dataset) -> None:
    run = trainer(toy, ABCNNSettings("abcnn3", embedding=8, blocks=2), ABCNNMatcher)
    assert run.model.score.weight.tolist() == [[5.0, 5.0, 5.0]]
    item = toy.test[0]
    same = run.scores([dataclasses.replace(item, candidates=(item.question, *item.candidates[1:]))])[0]
    assert same[0] == pytest.approx(15, abs=1e-4) and max(same[1:]) < 15


def test_resumed_training_is_uninterrupted_training(toy: Dataset, tmp_path: Path) -> None:
    whole, part, rest = trainer(toy), trainer(toy), trainer(toy)
    for _ in range(4):
        whole.epoch()
    for _ in range(2):
        part.epoch()
    path = tmp_path / "checkpoint.pt"
    train.save_checkpoint(path, TINY.as_dict(), {"ours": part})
    torch.rand(7)  # the state of the global generator must not matter
    train.load_checkpoint(path, TINY.as_dict(), {"ours": rest})
    for _ in range(2):
        rest.epoch()
    assert rest.losses == whole.losses and rest.dev_map == whole.dev_map
    rest.use_best()
    whole.use_best()
    assert rest.scores(toy.test) == whole.scores(toy.test)


def test_a_failed_write_leaves_the_old_checkpoint(
    toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = trainer(toy), tmp_path / "checkpoint.pt"
    train.save_checkpoint(path, {}, {"ours": run})
    before = path.read_bytes()

    def fail(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        train.save_checkpoint(path, {}, {"ours": run})
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "toy.tsv"]


def test_ctrl_c_while_the_file_is_written_is_still_ctrl_c(
    toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside torch.save it would come out as a RuntimeError about an unexpected position."""

    class Interrupted(io.BytesIO):
        pressed = False

        def write(self, content: Any) -> int:
            if len(content) > 1000 and not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt
            return super().write(content)

    def fdopen(handle: int, mode: str) -> io.BytesIO:
        os.close(handle)
        return Interrupted()

    monkeypatch.setattr(os, "fdopen", fdopen)
    with pytest.raises(KeyboardInterrupt):
        train.save_checkpoint(tmp_path / "checkpoint.pt", {}, {"ours": trainer(toy)})
    assert os.listdir(tmp_path) == ["toy.tsv"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_broken_and_missing_checkpoints_are_refused(
    content: bytes | None, toy: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        train.load_checkpoint(path, {}, {"ours": trainer(toy)})


def without_a_weight(state: dict[str, Any]) -> None:
    del state["trainers"]["ours"]["model"]["score.weight"]


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "settings": lambda state: state.update(settings=5),
    "no peer": lambda state: state["trainers"].pop("peer"),
    "no losses": lambda state: state["trainers"]["peer"].pop("losses"),
    "a weight": without_a_weight,
    "best": lambda state: state["trainers"]["ours"].update(best={}),
    "epochs": lambda state: state["trainers"]["peer"]["dev_map"].append(0.5),
    "optimizer": lambda state: state["trainers"]["ours"].update(optimizer=5),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(name: str, toy: Dataset, tmp_path: Path) -> None:
    trainers = {"ours": trainer(toy), "peer": trainer(toy, build=peer)}
    for run in trainers.values():
        run.epoch()
    path = tmp_path / "checkpoint.pt"
    train.save_checkpoint(path, TINY.as_dict(), trainers)
    train.load_checkpoint(path, TINY.as_dict(), trainers)
    state = torch.load(path, weights_only=True)
    DAMAGES[name](state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a whole checkpoint"):
        train.load_checkpoint(path, TINY.as_dict(), trainers)


def test_cut_off_checkpoints_are_refused(toy: Dataset, tmp_path: Path) -> None:
    run, path = trainer(toy), tmp_path / "checkpoint.pt"
    train.save_checkpoint(path, {}, {"ours": run})
    whole = path.read_bytes()
    for size in (10, 1000, 20_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"checkpoint\.pt is not a whole checkpoint"):
            train.load_checkpoint(path, {}, {"ours": run})


class Payload:
    """Pickled code: loading it opens, and so makes, the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_checkpoint_cannot_run_code(toy: Dataset, tmp_path: Path) -> None:
    run, path = trainer(toy), tmp_path / "checkpoint.pt"
    train.save_checkpoint(path, {}, {"ours": run})
    torch.save(torch.load(path, weights_only=True) | {"more": Payload(tmp_path / "made")}, path)
    with pytest.raises(ValueError, match="UnpicklingError"):
        train.load_checkpoint(path, {}, {"ours": run})
    assert not (tmp_path / "made").exists()


# Report


def test_results_are_of_the_best_epoch_and_the_blend_never_sees_test_labels(toy: Dataset) -> None:
    trainers = {"ours": trainer(toy), "peer": trainer(toy, build=peer)}
    for run in trainers.values():
        run.epoch()
    best = trainers["ours"].scores(toy.test)
    turned = [dataclasses.replace(item, labels=item.labels[1:] + item.labels[:1]) for item in toy.test]
    weights = []
    for dataset in (toy, dataclasses.replace(toy, test=turned)):
        for run in trainers.values():
            torch.nn.init.zeros_(run.model.score.weight)  # a later epoch has spoilt the model
        rows = result_rows(dataset, Vocabulary(toy.train_texts), trainers["ours"].encoder, trainers)
        found = {row["case"]: row for row in rows}
        expected = evaluate(best, [item.labels for item in dataset.test])
        assert found["answers/model"]["map"] == pytest.approx(expected.map)
        assert trainers["ours"].scores(toy.test) == best
        weights.append(found["answers/model+overlap"]["weights"])
    assert weights[0] == weights[1]


# Command line and pictures


def answers(tmp_path: Path, *more: str) -> list[str]:
    data = tmp_path / "toy.tsv"
    if not data.exists():
        toy_tsv(data)
    out = str(tmp_path / "out")
    return ["answers", "--data", str(data), "--epochs", "2", "--out", out, *more]


def without_times(path: Path) -> list[dict[str, object]]:
    return [row for row in json.loads(path.read_text())["rows"] if row["case"] != "answers/time"]


def test_a_run_writes_results_and_pictures_that_the_results_alone_redraw(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, answers(tmp_path, "--json", str(tmp_path / "r.json")))
    assert result.exit_code == 0, result.output
    assert "BM25" in result.output and "checkpoint.pt" in os.listdir(tmp_path / "out")
    rows = {row["case"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert {"answers/random", "answers/bm25", "answers/model", "answers/model+overlap"} < rows.keys()
    time = rows["answers/time"]
    assert time["ratio"] == pytest.approx(time["peer"]["median"] / time["ours"]["median"])
    attention = rows["answers/attention"]
    assert len(attention["S"]) == len(attention["question"])
    assert len(attention["S"][0]) == len(attention["answer"])
    assert rows["answers/model"]["model"] == time["settings"]["model"] == "lstm"
    again = CliRunner().invoke(app, ["plot", str(tmp_path / "r.json"), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    for name in ("curves.svg", "map.svg", "attention.svg"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    picture = (tmp_path / "out" / "attention.svg").read_text()
    assert all(f">{word}<" in picture for word in (*attention["question"], *attention["answer"]))


def test_a_log_has_the_line_of_an_epoch_when_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch, logs = train.Trainer.epoch, []

    def noted(self: train.Trainer, *args: object) -> None:
        logs.append(sys.stdout.buffer.getvalue().decode())  # type: ignore[attr-defined]
        epoch(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(train.Trainer, "epoch", noted)
    assert CliRunner().invoke(app, answers(tmp_path)).exit_code == 0
    assert logs[:2] == ["", ""] and logs[2] == logs[3]
    numbers = r"loss \d+\.\d{4} dev MAP \d\.\d{3}"
    assert re.fullmatch(rf"epoch 1/2  ours: {numbers}  peer: {numbers}\n", logs[2])


def test_an_abcnn_run_has_no_peer_and_its_checkpoint_is_no_other_models(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, answers(tmp_path, "--model", "abcnn2"))
    assert result.exit_code == 0, result.output
    assert "ABCNN-2" in result.output and "torch" not in result.output
    rows = {row["case"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert rows["answers/model"]["model"] == "abcnn2"
    assert rows["answers/time"].keys() == {"case", "unit", "ours", "settings"}
    assert rows["answers/curves"].keys() == {"case", "ours"}
    assert {"curves.svg", "map.svg", "attention.svg", "checkpoint.pt"} <= set(os.listdir(tmp_path / "out"))
    for model in ("lstm", "abcnn3"):
        other = CliRunner().invoke(app, answers(tmp_path, "--model", model, "--resume"))
        assert other.exit_code == 2 and f"expected model {model}; got abcnn2" in other.stderr
    again = CliRunner().invoke(app, answers(tmp_path, "--model", "abcnn2", "--resume", "--epochs", "3"))
    assert again.exit_code == 0, again.output


def test_the_table_of_models_has_a_line_a_file(toy: Dataset) -> None:
    results = []
    for model, seed in (("lstm", 0), ("bcnn", 0), ("abcnn3", 2)):
        settings = dataclasses.replace(tiny(model), seed=seed)
        trainers = {name: trainer(toy, settings, build) for name, build in builders(settings).items()}
        for run in trainers.values():
            run.epoch()
        rows = result_rows(toy, Vocabulary(toy.train_texts), trainers["ours"].encoder, trainers)
        results.append(rows)

    def table() -> list[str]:
        return models_table({Path(f"{n}.json"): Run.of(rows) for n, rows in enumerate(results)}).split("\n")

    lines = table()
    titles = ["model", "random order", "BM25", "LSTM + attention", "BCNN", "ABCNN-3, seed 2"]
    assert [line.split(" | ")[0][2:] for line in (lines[0], *lines[2:])] == titles
    assert {line.count("|") for line in lines} == {6}
    found = {row["case"]: row for row in results[1]}
    alone, blended = found["answers/model"], found["answers/model+overlap"]
    assert f"| {alone['map']:.3f} ± {alone['map_error']:.3f} | {alone['mrr']:.3f} |" in lines[5]
    assert lines[5].endswith(f" | {blended['map']:.3f} ± {blended['map_error']:.3f} |")
    del results[0][3]["model"]  # as before there was a choice
    assert table() == lines
    assert results[0][0]["fingerprint"] == toy.fingerprint

    # Other questions, as many: told by the fingerprint, and without it by what the baselines score.
    results[2][0]["fingerprint"] = "toy.tsv 0123"
    with pytest.raises(ValueError, match=r"same test questions; 0\.json has .* 2\.json .* of toy\.tsv 0123"):
        table()
    del results[0][0]["fingerprint"]
    with pytest.raises(ValueError, match=r"1\.json has .* 2\.json"):
        table()
    del results[2][0]["fingerprint"]
    assert table() == lines
    results[2][2]["mrr"] += 0.01
    with pytest.raises(ValueError, match=r"0\.json has .* 2\.json"):
        table()
    results[2][2]["mrr"] -= 0.01
    results[1][0] |= {"name": "toy", "test": 3}
    with pytest.raises(ValueError, match=r"0\.json has .*, 1\.json 3 test questions of toy"):
        table()


def test_ctrl_c_keeps_finished_epochs_and_resume_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = CliRunner().invoke(app, answers(tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output

    epoch = train.Trainer.epoch

    def interrupted(self: train.Trainer, *args: object) -> None:
        if self.epochs == 1:
            raise KeyboardInterrupt
        epoch(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(train.Trainer, "epoch", interrupted)
    monkeypatch.setattr(sys, "argv", ["gatematch-bench", *answers(tmp_path)])
    stopped = CliRunner().invoke(app, answers(tmp_path))
    assert stopped.exit_code == 130
    assert "interrupted in epoch 2 of 2" in stopped.stderr and "Traceback" not in stopped.output

    # What is printed can be run as it is, with nothing on PATH.
    monkeypatch.setattr(train.Trainer, "epoch", epoch)
    command = shlex.split(stopped.stderr.split("go on with: ")[1])
    assert command == [sys.executable, "-m", "gatematch.bench", *answers(tmp_path, "--resume")]
    resumed = CliRunner().invoke(app, command[3:])
    assert resumed.exit_code == 0, resumed.output
    results = (tmp_path / "out" / "results.json", tmp_path / "whole" / "out" / "results.json")
    assert without_times(results[0]) == without_times(results[1])

    foreign = CliRunner().invoke(app, answers(tmp_path, "--resume", "--seed", "3"))
    assert foreign.exit_code == 2 and "expected seed 3; got 0" in foreign.stderr
    fewer = CliRunner().invoke(app, answers(tmp_path, "--resume", "--epochs", "1"))
    assert fewer.exit_code == 2 and "already has 2 epochs" in fewer.stderr

    # The same texts with other labels fit the same model, but are other data.
    data = tmp_path / "toy.tsv"
    data.write_text(data.read_text().replace("number 1\t0", "number 1\t1"))
    other = CliRunner().invoke(app, answers(tmp_path, "--resume"))
    assert other.exit_code == 2 and "expected data toy.tsv" in other.stderr


def test_a_run_keeps_the_older_checkpoint_but_never_resumes_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"older")

    def interrupted(self: train.Trainer, *args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "epoch", interrupted)
    for _ in range(2):
        stopped = CliRunner().invoke(app, answers(tmp_path))
        assert stopped.exit_code == 130 and "none is kept" in stopped.stderr
        assert os.listdir(tmp_path / "out") == ["checkpoint.old.pt"]
    assert (tmp_path / "out" / "checkpoint.old.pt").read_bytes() == b"older"


@pytest.mark.parametrize(
    "options",
    [
        ["--json", "folder"],
        ["--json", "file/below"],
        ["--out", "folder"],
        ["--out", "file/below", "--json", "fine.json"],
    ],
)
def test_where_nothing_can_be_written_is_said_before_training(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder" / "results.json").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(train.Trainer, "epoch")
    result = CliRunner().invoke(app, answers(tmp_path, *options))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in options[:2])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["answers", "--data", "nowhere.tsv"], "nowhere.tsv"),
        (["answers", "--test", "nowhere.tsv"], "go with --data"),
        (["answers", "--device", "abacus"], "abacus"),
        (["answers", "--device", "meta"], "only cpu and cuda"),
        (["answers", "--seed", "99999999999999"], "--seed"),
        (["answers", "--epochs", "0"], "epochs"),
        (["answers", "--model", "gru"], "one of lstm, bcnn, abcnn1, abcnn2, abcnn3; got 'gru'"),
        (["plot", "nowhere.json"], "nowhere.json"),
        (["answers", "--resume", "--out", "nowhere"], "no checkpoint"),
    ],
)
def test_wrong_options_are_one_clear_error(arguments: list[str], part: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and part in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("case", "message"),
    [("answers/map", "must hold the case answers/attention"), ("lstm/forward", "must come from answers")],
)
def test_results_without_a_whole_answers_run_are_not_drawn(case: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"meta": {}, "rows": [{"case": case}]}))
    with pytest.raises(ValueError, match=message):
        draw(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
