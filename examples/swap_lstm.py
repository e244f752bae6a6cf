"""Swap torch.nn.LSTM for gatematch.lstm.LSTM in a script, in the middle of its training, and back.

The script is a tagger: it reads strings of brackets and other characters and says for each character how
deep it is nested. It is trained with torch.nn.LSTM and saved; with the import line changed it goes on from
that checkpoint, optimiser state included, and saves one that torch.nn.LSTM loads.

    python examples/swap_lstm.py        # about 10 s on one thread
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gatematch.lstm

CHARACTERS = "()ab"
DEPTH = 4  # and no deeper
IGNORE = -100  # what cross_entropy leaves out


class Tagger(nn.Module):
    """What you have. `LSTM` is what the script imports: from torch.nn before, from gatematch.lstm after."""

    def __init__(self, LSTM):
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), 16)
        self.rnn = LSTM(16, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * 32, DEPTH + 1)

    def forward(self, tokens, lengths):
        x = self.embedding(tokens)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.rnn(packed)
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=tokens.shape[1])
        return self.head(y)


class TaggerWithLengths(Tagger):
    """The same without packing, which the swapped module makes possible."""

    def forward(self, tokens, lengths):
        y, _ = self.rnn(self.embedding(tokens), lengths=lengths)
        return self.head(y)


def batch(size, longest, generator):
    """tokens (B, T), lengths (B,), depths (B, T) with IGNORE past the lengths."""
    tokens = torch.zeros(size, longest, dtype=torch.long)
    depths = torch.full((size, longest), IGNORE)
    lengths = torch.randint(1, longest + 1, (size,), generator=generator)
    for row, length in enumerate(lengths.tolist()):
        depth = 0
        for t, draw in enumerate(torch.randint(len(CHARACTERS), (length,), generator=generator).tolist()):
            if (draw == 0 and depth == DEPTH) or (draw == 1 and depth == 0):
                draw = 2  # no bracket fits here
            depth += (draw == 0) - (draw == 1)
            tokens[row, t], depths[row, t] = draw, depth
    return tokens, lengths, depths


def optimiser_of(model):
    rest = [*model.embedding.parameters(), *model.head.parameters()]
    groups = [{"params": model.rnn.parameters(), "lr": 5e-3}, {"params": rest, "lr": 1e-2}]
    return torch.optim.Adam(groups)


def train(model, optimiser, updates, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(updates):
        tokens, lengths, depths = batch(16, 30, generator)
        loss = nn.functional.cross_entropy(model(tokens, lengths).flatten(0, 1), depths.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def save(path, model, optimiser):
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, path)


def load(path, model):
    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimiser = optimiser_of(model)
    optimiser.load_state_dict(checkpoint["optimiser"])
    return model, optimiser


def difference(model, other, tokens, lengths):
    """The largest between the scores of two models, over what is no padding."""
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        return (model(tokens, lengths) - other(tokens, lengths))[valid].abs().max().item()


def positive(text):
    """For argparse: an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=positive, default=60, help="before the swap; half as many after it")
    updates = parser.parse_args().updates
    more = max(updates // 2, 1)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    tokens, lengths, depths = batch(64, 30, torch.Generator().manual_seed(1))

    with tempfile.TemporaryDirectory() as folder:
        # 1. The script as it was, and its checkpoint.
        checkpoint = Path(folder, "tagger.pt")
        old = Tagger(torch.nn.LSTM)
        optimiser = optimiser_of(old)
        losses = train(old, optimiser, updates, seed=2)
        save(checkpoint, old, optimiser)
        print(f"torch.nn.LSTM, {updates} updates: loss {losses[0]:.2f}, then {losses[-1]:.2f}")

        # 2. The import changed: the same checkpoint, the same results.
        new, new_optimiser = load(checkpoint, Tagger(gatematch.lstm.LSTM))
        assert difference(old, new, tokens, lengths) < 1e-5
        print("gatematch's LSTM loads the checkpoint and gives the same scores")

        # 3. Both go on from there, optimiser state included, on the same batches.
        old_losses = train(old, optimiser, more, seed=3)
        new_losses = train(new, new_optimiser, more, seed=3)
        torch.testing.assert_close(torch.tensor(new_losses), torch.tensor(old_losses), rtol=0, atol=1e-3)
        print(f"both trained on, {more} updates: losses {old_losses[-1]:.4f} and {new_losses[-1]:.4f}")

        # 4. And back.
        save(checkpoint, new, new_optimiser)
        back, _ = load(checkpoint, Tagger(torch.nn.LSTM))
        assert difference(back, new, tokens, lengths) < 1e-5
        print("torch.nn.LSTM loads what it saved and gives the same scores")

    # 5. A network that exists already, perhaps somebody else's: every nn.LSTM inside it is replaced, its
    # parameters are the same objects, so the optimiser made for them stays good.
    before = list(old.parameters())
    network = gatematch.lstm.convert(old)
    assert network is old and isinstance(network.rnn, gatematch.lstm.LSTM)
    assert all(a is b for a, b in zip(before, network.parameters(), strict=True))
    train(network, optimiser, 1, seed=4)
    print("convert() replaced the LSTM inside the network; its optimiser goes on")

    # 6. Packing and unpacking become `lengths=`, which allows 0 and never reads padding.
    plain = TaggerWithLengths(gatematch.lstm.LSTM)
    plain.load_state_dict(network.state_dict())
    assert difference(network, plain, tokens, lengths) < 1e-5
    some_empty = lengths * (torch.arange(len(lengths)) % 5 > 0)
    assert plain(tokens, some_empty).isfinite().all()
    print("lengths= gives what packing gave, and takes rows of length 0")

    with torch.no_grad():
        guess = plain(tokens, lengths).argmax(2)
    accuracy = (guess == depths)[depths != IGNORE].float().mean().item()
    assert accuracy > 0.8 or updates < 60
    print(f"depths right on unseen strings: {100 * accuracy:.0f}%")


if __name__ == "__main__":
    main()
