"""A character language model: train an LSTM on a text, then let it write, one character at a time.

    python char_language_model.py                                    # on Python's own help texts
    python char_language_model.py --text mine.txt --save model.pt    # on a text of yours
    python char_language_model.py --load model.pt --prompt "The "    # no training, only writing

The text is cut into `--batch` streams that are read side by side, `--window` characters a step, and the
state (h, c) that ends a window starts the next one: the model remembers further back than the gradient
goes (truncated backpropagation through time). The last tenth of the text is held out. Bits per character
there are compared with those of n-gram counts, so that the number means something.
"""

import argparse
import math
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gatematch.lstm import LSTM, init_gates_


class CharModel(nn.Module):
    """Scores (T, B, characters) of what follows each of `ids` (T, B), and the state (h, c) after the last."""

    def __init__(self, characters, hidden_size=128, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm = LSTM(64, hidden_size, num_layers=2, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, characters)
        init_gates_(self.lstm, {"b_*": 0.0, "b_if_*": 1.0})  # remember by default

    def forward(self, ids, state=None):
        y, state = self.lstm(self.embedding(ids), state)
        return self.head(self.dropout(y)), state


def help_texts():
    """Python's help texts in alphabetical order, without the paragraphs that came before.

    Many topics repeat others; with these the held-out part would be known by heart.
    """
    from pydoc_data.topics import topics

    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def ngram_bits(text, held_out, orders, characters):
    """Bits per character of n-gram counts for n = 1 to `orders`, mixed with the shorter ones (Witten-Bell).

    With N characters seen after a context, T different ones:  p_n(c) = (count(c) + T p_{n-1}(c)) / (N + T).
    """
    counts = [defaultdict(Counter) for _ in range(orders)]
    for n, after in enumerate(counts):
        for i in range(n, len(text)):
            after[text[i - n : i]][text[i]] += 1
    sums = [{context: seen.total() for context, seen in after.items()} for after in counts]
    bits = [0.0] * orders
    for i, character in enumerate(held_out):
        p = 1 / characters
        for n, after in enumerate(counts):
            context = held_out[i - n : i]
            if i >= n and context in after:
                seen = after[context]
                p = (seen[character] + len(seen) * p) / (sums[n][context] + len(seen))
            bits[n] -= math.log2(p) / len(held_out)
    return bits


def train(model, ids, steps, batch, window, rate):
    length = (len(ids) - 1) // batch
    inputs = ids[: batch * length].view(batch, length).T  # (length, batch): a stream a column
    targets = ids[1 : batch * length + 1].view(batch, length).T
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    model.train()
    start, state, began, total, count = 0, None, time.perf_counter(), 0.0, 0
    for step in range(1, steps + 1):
        if start + window > length:  # the end of the streams: from their beginning, knowing nothing
            start, state = 0, None
        scores, state = model(inputs[start : start + window], state)
        state = tuple(part.detach() for part in state)  # its values go on, its gradient does not
        loss = cross_entropy(scores.flatten(0, 1), targets[start : start + window].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        start += window
        total, count = total + loss.item() / math.log(2), count + 1
        if step % max(1, steps // 10) == 0:
            seconds = time.perf_counter() - began
            print(
                f"step {step:5}   {total / count:.3f} bits per character in training   {seconds:4.0f} s",
                flush=True,
            )
            total, count = 0.0, 0


@torch.no_grad()
def bits_per_character(model, ids, window=1000):
    """Of all of `ids` but the first, from a state of zeros: as in one pass, with memory for one window."""
    model.eval()
    state, total = None, 0.0
    for inputs, targets in zip(ids[:-1].split(window), ids[1:].split(window), strict=True):
        scores, state = model(inputs[:, None], state)
        total += cross_entropy(scores[:, 0], targets, reduction="sum").item()
    return total / (len(ids) - 1) / math.log(2)


@torch.no_grad()
def generate(model, characters, prompt, length, temperature):
    """`prompt` and `length` characters after it, each drawn from softmax(scores / temperature)."""
    model.eval()
    ids = torch.tensor([[characters.index(character)] for character in prompt])
    scores, state = model(ids)  # the prompt, in one call
    text = prompt
    for _ in range(length):
        drawn = torch.multinomial(torch.softmax(scores[-1] / temperature, -1), 1)  # (1, 1): one step, one row
        text += characters[drawn.item()]
        scores, state = model(drawn, state)
    return text


def at_least(least):
    """For argparse: an integer that is not smaller."""

    def integer(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return int(text)

    return integer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--text", type=Path, help="a text file in UTF-8 to train on (default: Python's help texts)"
    )
    parser.add_argument("--steps", type=at_least(1), default=400, help="of training (default: %(default)s)")
    parser.add_argument(
        "--hidden-size", type=at_least(1), default=128, help="of both layers (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=8, help="streams side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--window", type=at_least(1), default=64, help="characters a step (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=0.01, help="the highest learning rate (default: %(default)s)"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="after each layer (default: %(default)s)")
    parser.add_argument(
        "--prompt", default="The ", help="what the written text begins with (default: %(default)r)"
    )
    parser.add_argument(
        "--length", type=at_least(0), default=400, help="characters to write (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="below 1: safer, above: wilder (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of weights and draws (default: %(default)s)"
    )
    parser.add_argument("--save", type=Path, help="write the trained model here")
    parser.add_argument("--load", type=Path, help="read a saved model instead of training one")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    positive = all(0 < number < math.inf for number in (args.temperature, args.rate))
    if not args.prompt or not positive or not 0 <= args.dropout < 1:
        parser.error("--prompt must not be empty, --temperature and --rate be positive, --dropout in [0, 1)")
    if args.save and not args.save.parent.is_dir():
        parser.error(f"--save: there is no folder {args.save.parent}")
    for path in (args.save, args.json):
        if path and path.is_dir():
            parser.error(f"--save and --json must be files; {path} is a folder")
    if args.load and (args.text or args.save or args.json):
        parser.error("--load trains nothing, so it takes no --text, --save or --json")
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    torch.manual_seed(args.seed)

    if args.load:
        if not args.load.is_file():
            parser.error(f"--load: there is no file {args.load}")
        try:
            saved = torch.load(args.load, weights_only=True)
            characters = saved["characters"]
            model = CharModel(len(characters), saved["hidden_size"])
            model.load_state_dict(saved["model"])
        except Exception as error:  # torch.load raises many kinds
            parser.error(f"--load: {args.load} is not what --save writes ({type(error).__name__})")
    else:
        try:
            text = args.text.read_text(encoding="utf-8") if args.text else help_texts()
        except OSError as error:
            parser.error(f"--text: {args.text} cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            parser.error(f"--text: {args.text} is no text in UTF-8")
        split = len(text) * 9 // 10
        if split <= args.batch * args.window or len(text) - split < 2:
            parser.error(
                f"--text: {args.text or 'the help'} has {len(text)} characters, too few for --batch "
                f"{args.batch} times --window {args.window} in the first nine tenths"
            )
        characters = "".join(sorted(set(text)))
        model = CharModel(len(characters), args.hidden_size, args.dropout)
    if unknown := set(args.prompt) - set(characters):
        parser.error(f"--prompt has characters that the text lacks: {''.join(sorted(unknown))!r}")

    if not args.load:
        ids = torch.tensor([characters.index(character) for character in text])
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(f"{len(text)} characters, {len(characters)} different; {weights} weights", flush=True)
        train(model, ids[:split], args.steps, args.batch, args.window, args.rate)
        if args.save:
            saved = {"model": model.state_dict(), "characters": characters, "hidden_size": args.hidden_size}
            torch.save(saved, args.save)

        bits = {"uniform": math.log2(len(characters))}
        for n, found in enumerate(ngram_bits(text[:split], text[split:], 5, len(characters)), 1):
            bits[{1: "unigram", 2: "bigram", 3: "trigram"}.get(n, f"{n}-gram")] = found
        bits["LSTM"] = bits_per_character(model, ids[split:])
        print("\nbits per character on the held-out tenth:")
        for name, found in bits.items():
            print(f"  {name:8} {found:.3f}")

    sample = generate(model, characters, args.prompt, args.length, args.temperature)
    print(f"\n{sample}")

    if args.json:
        from gatematch.bench.results import describe_machine, write_results

        rows = [
            {
                "case": f"example/{name}",
                "bits per character": round(found, 3),
                "perplexity": round(2**found, 1),
            }
            for name, found in bits.items()
        ]
        write_results(args.json, describe_machine(torch.device("cpu")) | {"sample": sample}, rows)

    trained_by = ("text", "steps", "hidden_size", "batch", "window", "rate", "dropout", "seed", "load")
    if all(getattr(args, name) == parser.get_default(name) for name in trained_by):
        assert bits["LSTM"] < bits["bigram"], "the default training beats bigrams"


if __name__ == "__main__":
    main()
