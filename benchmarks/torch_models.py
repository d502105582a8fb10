"""Recommenders in plain PyTorch, with one user, or one prefix, a padded row: what most people train today.

Sizes, activations and places of dropout are those of :mod:`models`; nothing here is tuned, and nothing is slowed down.
"""

import numpy as np
import torch
from torch import nn


class SASRec(nn.Module):
    """As :class:`models.architectures.sasrec.SASRec`."""

    def __init__(self, num_items, max_length, embedding_dim, num_blocks, num_heads, dropout_rate):
        super().__init__()
        self.item_embedding = nn.Embedding(num_items + 1, embedding_dim, padding_idx=0)
        self.position_embedding = nn.Embedding(max_length, embedding_dim)
        self.dropout = nn.Dropout(dropout_rate)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention_norm": nn.LayerNorm(embedding_dim),
                    "attention": nn.MultiheadAttention(embedding_dim, num_heads, dropout_rate, batch_first=True),
                    "feed_forward_norm": nn.LayerNorm(embedding_dim),
                    "feed_forward": nn.Sequential(
                        nn.Linear(embedding_dim, embedding_dim),
                        nn.Dropout(dropout_rate),
                        nn.ReLU(),
                        nn.Linear(embedding_dim, embedding_dim),
                        nn.Dropout(dropout_rate),
                    ),
                }
            )
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(embedding_dim)
        self.register_buffer("later", torch.ones(max_length, max_length, dtype=torch.bool).triu(1))

    def forward(self, inputs):
        """Encodes (users, max_length) item ids, padded in front."""
        blank = (inputs == 0).unsqueeze(-1)
        x = self.item_embedding(inputs) * self.item_embedding.embedding_dim**0.5 + self.position_embedding.weight
        x = self.dropout(x).masked_fill(blank, 0)
        for block in self.blocks:
            query = block["attention_norm"](x)
            x = x + block["attention"](query, x, x, attn_mask=self.later, need_weights=False)[0]
            x = block["feed_forward_norm"](x)
            x = (x + block["feed_forward"](x)).masked_fill(blank, 0)
        return self.norm(x)

    def loss(self, sequences):
        """One-negative binary cross-entropy; ``sequences`` (users, max_length + 1), padded in front."""
        inputs, targets = sequences[:, :-1], sequences[:, 1:]
        hidden = self(inputs)
        negatives = torch.randint(1, self.item_embedding.num_embeddings, targets.shape)
        there = (inputs > 0) & (targets > 0)
        positive = (hidden * self.item_embedding(targets)).sum(-1)[there]
        negative = (hidden * self.item_embedding(negatives)).sum(-1)[there]
        return nn.functional.softplus(-positive).mean() + nn.functional.softplus(negative).mean()


class BERT4Rec(nn.Module):
    """As :class:`models.architectures.bert4rec.BERT4Rec` with its separate output layer."""

    def __init__(self, num_items, max_length, embedding_dim, num_blocks, num_heads, dropout_rate, mask_probability):
        super().__init__()
        self.mask_token, self.mask_probability = num_items + 1, mask_probability
        self.item_embedding = nn.Embedding(num_items + 2, embedding_dim, padding_idx=0)
        self.position_embedding = nn.Embedding(max_length, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim)
        self.dropout = nn.Dropout(dropout_rate)
        layer = nn.TransformerEncoderLayer(
            embedding_dim, num_heads, 4 * embedding_dim, dropout_rate, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_blocks, enable_nested_tensor=False)
        self.output = nn.Linear(embedding_dim, num_items + 2)

    def loss(self, sequences):
        """Softmax cross-entropy of the masked items; ``sequences`` (users, max_length), padded in front."""
        masked = (torch.rand(sequences.shape) < self.mask_probability) & (sequences > 0)
        inputs = sequences.masked_fill(masked, self.mask_token)
        x = self.dropout(self.norm(self.item_embedding(inputs) + self.position_embedding.weight))
        x = self.encoder(x, src_key_padding_mask=sequences == 0)
        # Only masked positions are scored: many scripts score all of them and are slower still.
        return nn.functional.cross_entropy(self.output(x[masked]), sequences[masked])


class Prefixes:
    """Every prefix of every training sequence, as rows padded behind to the longest of a batch."""

    def __init__(self, train, max_length):
        places = np.arange(len(train.items))
        firsts = np.repeat(train.offsets[:-1], train.lengths)
        self.items = torch.from_numpy(np.append(train.items, 0).astype(np.int64))
        self.ends = torch.from_numpy(places[places > firsts] + 1)
        self.starts = torch.maximum(torch.from_numpy(firsts[places > firsts]), self.ends - max_length - 1)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, samples):
        """Items (samples, longest input + 1), the last of each row the target."""
        starts, ends = self.starts[samples, None], self.ends[samples, None]
        places = starts + torch.arange(int((ends - starts).max()))
        return self.items[torch.where(places < ends, places, len(self.items) - 1)]


class GRU4Rec(nn.Module):
    """As :class:`models.architectures.gru4rec.GRU4Rec`, one prefix a row."""

    def __init__(self, num_items, embedding_dim, hidden_dim, num_gru_layers, dropout_rate):
        super().__init__()
        self.item_embedding = nn.Embedding(num_items + 1, embedding_dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout_rate)
        self.gru = nn.GRU(embedding_dim, hidden_dim, num_gru_layers, bias=False, batch_first=True)
        self.dense = nn.Linear(hidden_dim, embedding_dim)

    def loss(self, sequences):
        """BPR; ``sequences`` (prefixes, longest input + 1), padded behind, the last item of each the target."""
        newest = (sequences > 0).sum(1) - 2
        states, _ = self.gru(self.dropout(self.item_embedding(sequences[:, :-1])))
        row = torch.arange(len(sequences))
        query = self.dense(states[row, newest])
        targets = sequences[row, newest + 1]
        negatives = torch.randint(1, self.item_embedding.num_embeddings, targets.shape)
        positive, negative = ((query * self.item_embedding(items)).sum(-1) for items in (targets, negatives))
        return nn.functional.softplus(negative - positive).mean()


class STOSA(nn.Module):
    """As :class:`models.architectures.stosa.STOSA`, where the mean skips the blocks."""

    def __init__(
        self,
        num_items,
        max_length,
        embedding_dim,
        num_blocks,
        num_heads,
        dropout_rate,
        attention_dropout_rate,
        pvn_weight,
    ):
        super().__init__()
        self.num_heads, self.pvn_weight = num_heads, pvn_weight
        self.item_mean, self.item_covariance = (nn.Embedding(num_items + 1, embedding_dim) for _ in range(2))
        self.position_mean, self.position_covariance = (nn.Embedding(max_length, embedding_dim) for _ in range(2))
        self.norm = nn.LayerNorm(embedding_dim, eps=1e-12)
        self.dropout, self.attention_dropout = nn.Dropout(dropout_rate), nn.Dropout(attention_dropout_rate)
        names = ("mean_query", "mean_key", "query", "key", "value", "out")
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(embedding_dim, embedding_dim) for name in names}
                | {
                    "attention_norm": nn.LayerNorm(embedding_dim, eps=1e-12),
                    "feed_forward": nn.Sequential(
                        nn.Linear(embedding_dim, 4 * embedding_dim),
                        nn.ELU(),
                        nn.Linear(4 * embedding_dim, embedding_dim),
                    ),
                    "feed_forward_norm": nn.LayerNorm(embedding_dim, eps=1e-12),
                }
            )
            for _ in range(num_blocks)
        )
        self.register_buffer("later", torch.ones(max_length, max_length, dtype=torch.bool).triu(1))

    def forward(self, inputs):
        """Means and covariances (users, max_length, dim) of item ids padded in front."""
        elu, hidden = nn.functional.elu, (self.later | (inputs == 0)[:, None, :])[:, None]
        mean = elu(self.dropout(self.norm(self.item_mean(inputs) + self.position_mean.weight)))
        covariance = elu(self.dropout(self.norm(self.item_covariance(inputs) + self.position_covariance.weight))) + 1

        def heads(x):
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        for block in self.blocks:
            query, key = heads(block["mean_query"](mean)), heads(block["mean_key"](mean))
            query_variance, key_variance, value = (
                heads(elu(block[name](covariance)) + 1) for name in ("query", "key", "value")
            )
            distance = squared_distances(query, key, query_variance, key_variance)
            scores = (-distance / query.shape[-1] ** 0.5).masked_fill(hidden, -(2**32) + 1)
            weights = self.attention_dropout(scores.softmax(-1))
            context = (weights.square() @ value).transpose(1, 2).flatten(2)
            covariance = block["attention_norm"](covariance + self.dropout(block["out"](context)))
            added = self.dropout(block["feed_forward"](covariance))
            covariance = elu(block["feed_forward_norm"](covariance + added)) + 1
        return mean, covariance

    def loss(self, sequences):
        """BPR on distances and the penalty; ``sequences`` (users, max_length + 1), padded in front."""
        inputs, targets = sequences[:, :-1], sequences[:, 1:]
        there = inputs > 0
        history = [x[there] for x in self(inputs)]
        positive = self.gaussian(targets[there])
        negative = self.gaussian(torch.randint(1, self.item_mean.num_embeddings, (int(there.sum()),)))
        near, far, between = (
            (a[0] - b[0]).square().sum(-1) + (root(a[1]) - root(b[1])).square().sum(-1)
            for a, b in [(history, positive), (history, negative), (positive, negative)]
        )
        return nn.functional.softplus(near - far).mean() + self.pvn_weight * (near - between).relu().mean()

    def gaussian(self, items):
        """Means and covariances of items."""
        return self.item_mean(items), nn.functional.elu(self.item_covariance(items)) + 1


def root(covariance):
    """Standard deviations."""
    return covariance.clamp(min=1e-24).sqrt()


def squared_distances(mean, other_mean, covariance, other_covariance):
    """Squared Wasserstein distances of all pairs, by two matrix products."""
    sizes = (mean.square() + covariance).sum(-1, keepdim=True)
    other_sizes = (other_mean.square() + other_covariance).sum(-1, keepdim=True)
    products = mean @ other_mean.transpose(-1, -2) + root(covariance) @ root(other_covariance).transpose(-1, -2)
    return sizes + other_sizes.transpose(-1, -2) - 2 * products


class MFBPR(nn.Module):
    """As :class:`models.architectures.mf_bpr.MFBPR`; gradients are dense, so the optimizer updates every row."""

    def __init__(self, num_users, num_items, embedding_dim):
        super().__init__()
        self.user_embedding = nn.Embedding(num_users, embedding_dim)
        self.item_embedding = nn.Embedding(num_items + 1, embedding_dim)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=1e-4)

    def loss(self, users, positives):
        """One-negative BPR; ``users`` and ``positives`` (pairs,), see :func:`draw_pairs`."""
        negatives = torch.randint(1, self.item_embedding.num_embeddings, positives.shape)
        vectors = self.user_embedding(users)
        positive = (vectors * self.item_embedding(positives)).sum(-1)
        negative = (vectors * self.item_embedding(negatives)).sum(-1)
        return nn.functional.softplus(negative - positive).mean()


def draw_pairs(items, offsets, count):
    """Users, uniformly and with replacement, and of each one of the items ``items[offsets[u]:offsets[u + 1]]``."""
    users = torch.randint(len(offsets) - 1, (count,))
    first, number = offsets[users], offsets[users + 1] - offsets[users]
    return users, items[first + (torch.rand(count) * number).long()]
