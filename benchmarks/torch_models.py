"""SASRec, BERT4Rec and MF-BPR in plain PyTorch, sequences with one user a padded row: what most people train today.

Sizes, activations and places of dropout are those of :mod:`models`; nothing here is tuned, and nothing is slowed down.
"""

import torch
from torch import nn


class SASRec(nn.Module):
    """As :class:`models.sasrec.SASRec`."""

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
    """As :class:`models.bert4rec.BERT4Rec` with its separate output layer."""

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
