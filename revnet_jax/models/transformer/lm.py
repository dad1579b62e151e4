"""A reversible language model, and an irreversible one with the same parameters.

Branch f is causal attention, branch g a feed-forward network. The head reads the streams, combined
as the integrator says (see `Transformer`) and normalised, and predicts tokens.

Dims: B batch, T tokens, D stream width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.core import Grid
from revnet_jax.models.bridge import PureModule
from revnet_jax.models.dtypes import at_least_float32, narrowed
from revnet_jax.models.model import ModelOptions, Sweep, Variables
from revnet_jax.models.partition import by_batch, gather, on_batch, on_sequence, whole_sequences
from revnet_jax.models.transformer.attention import AttentionKernel, rotary_angles
from revnet_jax.models.transformer.base import (
    DUAL_BITS,
    Transformer,
    draw_factors,
    drop,
    init_layers_of,
)
from revnet_jax.models.transformer.decoder import (
    LAYER_RULES,
    NORMS,
    Attention,
    Cache,
    Experts,
    FeedForward,
    Positions,
)
from revnet_jax.models.transformer.linear import Adapter
from revnet_jax.models.transformer.linear_cross_entropy import linear_cross_entropy
from revnet_jax.models.transformer.shape import LanguageModelShape


class LanguageModel(Transformer):
    """A decoder as pure functions: `init(key)`, `loss(variables, ...)`, `extend(...)` to generate.

    Args:
      options: how it computes.
      attention: the kernel, see `attend`.
      feed_forward_chunks: see `FeedForward`.
      loss_chunk: number of tokens per device whose logits exist at a time.
    """

    # The vocabulary is sharded over "tensor", so each device computes the logits of its own part.
    rules = ((r"embed$", ("tensor", "fsdp")), (r"head/kernel$", ("fsdp", "tensor")), *LAYER_RULES)

    def __init__(
        self,
        shape: LanguageModelShape,
        options: ModelOptions = ModelOptions(),
        *,
        attention: AttentionKernel = "chunked",
        feed_forward_chunks: int = 1,
        loss_chunk: int = 2048,
    ):
        super().__init__(
            layers=shape.layers,
            reversible=shape.reversible,
            options=options,
            integrator=shape.integrator,
        )
        if min(feed_forward_chunks, loss_chunk) < 1:
            raise ValueError(
                f"got feed_forward_chunks={feed_forward_chunks}, loss_chunk={loss_chunk}, expected "
                "1 or more"
            )
        if shape.experts and feed_forward_chunks > 1:
            raise ValueError(
                f"got feed_forward_chunks={feed_forward_chunks} and experts, expected 1: all "
                "tokens are routed together"
            )
        self.shape, self.loss_chunk = shape, loss_chunk
        self._in_chunks = feed_forward_chunks > 1
        a = shape
        # The sum of the 2 L updates then has a standard deviation of about 1 in every element.
        out_std = lambda inputs: (inputs * 2 * a.layers) ** -0.5
        norm = functools.partial(NORMS[a.norm], eps=a.norm_eps)
        kernels: dict[str, Any] = {"lora": a.lora, "int8": a.int8}
        self._f = PureModule(
            lambda rngs: Attention(
                width=a.width,
                heads=a.heads,
                kv_heads=a.kv_heads,
                head_size=a.size_of_head,
                out_std=out_std(a.heads * a.size_of_head),
                kernel=attention,
                window=a.window,
                norm=norm,
                bias=a.bias,
                qk_norm=a.qk_norm,
                **kernels,
                dtype=self.compute_dtype,
                rngs=rngs,
            )
        )
        std = out_std(a.hidden)
        common: dict[str, Any] = {"width": a.width, "hidden": a.hidden, "out_std": std}
        common |= {"dtype": self.compute_dtype, "norm": norm}
        experts = {"experts": a.experts, "experts_per_token": a.experts_per_token}
        dense = {"chunks": feed_forward_chunks, "activation": a.activation, "bias": a.bias == "all"}
        common |= experts if a.experts else dense | kernels
        feed_forward = Experts if a.experts else FeedForward
        self._g = PureModule(lambda rngs: feed_forward(**common, rngs=rngs))
        adapter = lambda rngs: Adapter(a.width, a.adapter_rank, dtype=self.compute_dtype, rngs=rngs)
        self._adapter = PureModule(adapter) if self.integrator == "meft" else None
        self._norm = PureModule(lambda rngs: norm(a.width))

    @property
    def is_random(self) -> bool:
        """Whether training draws random numbers: for dropout, or the factors of "bdia"."""
        return self.shape.dropout > 0 or self.integrator == "bdia"

    def init(self, key: jax.Array) -> Variables:
        """Initialises the variables."""
        a = self.shape
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        # Small compared with the sum of the layers' updates: a std of 1 generalised less well than
        # 0.1.
        # A tied embedding is the head's kernel too: of this size it gives logits of about 1.
        std = a.width**-0.5 if a.tied else 0.1
        embedding_VD = std * jax.random.normal(embed_key, (a.vocab_size, a.width))
        head = self._norm.init(head_key)[0]
        if not a.tied:
            head["kernel"] = a.width**-0.5 * jax.random.normal(head_key, (a.width, a.vocab_size))
        modules = (self._f, self._g, *([] if self._adapter is None else [self._adapter]))
        layers = init_layers_of(modules, layers_key, a.layers)
        params = {"embed": embedding_VD, "layers": layers, "head": head}
        if a.learned_positions:
            # Derived from another key, so that the rest is what it is without learned positions.
            position_key = jax.random.fold_in(embed_key, 1)
            shape = (a.learned_positions, a.width)
            params["positions"] = std * jax.random.normal(position_key, shape)
        stats = {"batches": jnp.zeros(())} if self.integrator == "dual" else {}
        return Variables(narrowed(params, self.param_dtype), stats)

    def next_stats(self, stats: Any) -> Any:
        """The stats after a batch of training: "dual" counts the batches, or microbatches."""
        return {"batches": stats["batches"] + 1} if self.integrator == "dual" else stats

    def _scheduled(self, stats):
        """(factors c of "dual", [L, 2, 1, 1, 1], weight of x[n-1] in what the head reads).

        See the table of `Transformer`. They follow from the batches counted so far. Other
        integrators have no such factors.
        """
        if self.integrator != "dual":
            return None, 0.5
        done = jnp.minimum(1.0, stats["batches"] / self.shape.integrator_steps)
        # c = r**4 rises from 1/16 to 1. The coupling multiplies by r four times (DUAL_BITS), with r
        # rounded to a multiple of 2**-12. It is rounded here too, so that the head has the same c.
        c = Grid(12).snap(jnp.exp2(done - 1)) ** DUAL_BITS
        return jnp.full((self.shape.layers, 2, 1, 1, 1), c), c / 2

    def features(
        self,
        variables: Variables,
        token_BT: jax.Array,
        *,
        key: jax.Array | None = None,
        sweep: Sweep = Sweep(),
    ) -> tuple[jax.Array, Any]:
        """(x_BTD, the input of the head; auxiliary outputs of the feed-forward networks).

        Args:
          key: for what is random in training (`is_random`); None outside of training.
        """
        # A pair of keys for each layer, and one for the embedding and the factors of "bdia".
        keys = None if key is None else jax.random.split(key, (self.shape.layers + 1, 2))
        keys_L = None if keys is None else keys[:-1]
        x_BTD = self._embed(variables, token_BT, 0, None if keys is None else keys[-1, :1])
        factors_L, weight = self._scheduled(variables.stats)
        if keys is not None and self.integrator == "bdia":
            factors_L = draw_factors(keys[-1, 1], self.shape.layers, x_BTD)
        x_BTD, (_, aux_L) = self._run(
            self._layer(*self._branches(), training=key is not None),
            variables.params["layers"],
            x_BTD,
            shared=self._positions(0, token_BT)[0],
            data_L=(None, keys_L, factors_L),
            weight=weight,
            sweep=sweep,
        )
        return self._normalise(variables, x_BTD), aux_L

    def loss(
        self,
        variables: Variables,
        token_BT: jax.Array,
        target_BT: jax.Array,
        weight_BT: jax.Array | None = None,
        count: Any = None,
        **options: Any,
    ) -> tuple[jax.Array, Any]:
        """(the mean negative log-likelihood of the targets in nats, auxiliary outputs).

        Args:
          weight_BT: weight of each target in the mean; all equal by default.
          count: what the weighted sum is divided by; the sum of the weights by default.
          options: keyword arguments of `features`.

        The logits of all tokens never exist together (see `loss_chunk`).
        """
        x_BTD, aux_L = self.features(variables, token_BT, **options)
        if weight_BT is None:
            weight_BT = jnp.ones(target_BT.shape, x_BTD.dtype)
        group, kernel = self._head_kernel(variables)
        nll = by_batch(self._nll, self.rules, group, self.compute_dtype)
        total = jnp.sum(nll(kernel, x_BTD, target_BT, weight_BT))
        return total / (jnp.sum(weight_BT) if count is None else count), aux_L

    @jax.named_scope("head")
    def _nll(self, kernel, x_BTD, target_BT, weight_BT):
        """[1, 1]: the weighted sum of losses over the tokens of this device."""
        x_MD, target_M, weight_M = (
            array.reshape(-1, *array.shape[2:]) for array in (x_BTD, target_BT, weight_BT)
        )
        kernel_DV = kernel.T if self.shape.tied else kernel
        options = {"compute_dtype": self.compute_dtype, "chunk": self.loss_chunk}
        # [1, 1], because `by_batch` joins the results of devices along batch and sequence.
        return linear_cross_entropy(kernel_DV, x_MD, target_M, weight_M, **options)[None, None]

    def logits(self, variables: Variables, token_BT: jax.Array) -> jax.Array:
        """The logits of all tokens at once, float32 [B, T, V]."""
        x_BTD, _ = self.features(variables, token_BT)
        return self._logits(self._head_kernel(variables)[1], x_BTD)

    def log_likelihoods(
        self, variables: Variables, token_BT: jax.Array, target_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(log probability of each target in nats, whether it is the likeliest token), [B, T].

        Only the logits of one sequence per device exist at a time.
        """
        x_BTD, _ = self.features(variables, token_BT)
        group, kernel = self._head_kernel(variables)

        def of_sequences(kernel, x_BTD, target_BT):
            def of_sequence(sequence):
                x_TD, target_T = sequence
                logits_TV = self._logits(kernel, x_TD)
                picked_T = jnp.take_along_axis(logits_TV, target_T[:, None], axis=1)[:, 0]
                is_likeliest_T = jnp.argmax(logits_TV, axis=1) == target_T
                return picked_T - jax.nn.logsumexp(logits_TV, axis=1), is_likeliest_T

            return lax.map(of_sequence, (x_BTD, target_BT))

        of_devices = by_batch(of_sequences, self.rules, group, self.compute_dtype)
        return of_devices(kernel, x_BTD, target_BT)

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """An empty KV cache for `extend`, of `length` tokens, stacked over layers."""
        a = self.shape
        self._check_length(length)
        shape = (a.layers, batch_size, length, a.kv_heads, a.size_of_head)
        document_B = None if a.end_token is None else jnp.zeros(batch_size, jnp.int32)
        return Cache(*(jnp.zeros(shape, self.compute_dtype) for _ in range(2)), document_B)

    def extend(
        self, variables: Variables, cache: Cache, token_BT: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """(logits_BV of the token after the last one, the KV cache with these tokens added).

        Args:
          position: position of the first of these tokens. Position plus number of tokens must not
            exceed the length of the cache.

        Attention does not cross an end token (see `end_token` of `LanguageModelShape`).
        """
        x_BTD = self._embed(variables, token_BT, position, None)
        positions, document_B = self._positions(position, token_BT, cache.document_B)
        factors_L, weight = self._scheduled(variables.stats)
        # A layer gets its cache as its data, and returns it as its auxiliary output.
        x_BTD, (cache, _) = self._run(
            self._layer(*self._branches(), training=False),
            variables.params["layers"],
            x_BTD,
            shared=positions,
            data_L=(cache._replace(document_B=None), None, factors_L),
            weight=weight,
        )
        x_BD = self._normalise(variables, x_BTD)[:, -1]
        logits_BV = self._logits(self._head_kernel(variables)[1], x_BD)
        return logits_BV, cache._replace(document_B=document_B)

    def _positions(self, first, token_BT, document_B=None):
        """(positions of the tokens, document_B of the token that comes after them).

        document_B: the position at which the document of a token starts, here of the first one; 0
        by default.
        """
        a = self.shape
        first = jnp.asarray(first, jnp.int32)
        if a.learned_positions:  # they were added to the embeddings
            return Positions(first, None), None
        angles = rotary_angles(
            first + jnp.arange(token_BT.shape[1]),
            a.size_of_head,
            base=a.rotary_base,
            scaling=a.rotary_scaling,
            dtype=at_least_float32(self.compute_dtype),
        )
        if a.end_token is None:
            return Positions(first, on_sequence(angles)), None
        B, T = token_BT.shape
        document_B1 = jnp.zeros((B, 1), jnp.int32) if document_B is None else document_B[:, None]
        following_1T = first + 1 + jnp.arange(T, dtype=jnp.int32)[None]
        # Whole sequences, because a document may start on another device than its tokens.
        ends_BT = whole_sequences(token_BT) == a.end_token
        # Positions grow, so the largest start so far is that of the present document.
        next_BT = lax.cummax(jnp.where(ends_BT, following_1T, document_B1), axis=1)
        document_BT = whole_sequences(jnp.concatenate([document_B1, next_BT[:, :-1]], axis=1))
        return Positions(first, on_sequence(angles), document_BT), next_BT[:, -1]

    def _branches(self):
        """The branches (f, g), and the adapter of "meft".

        Their context holds the tokens' positions as `shared` and (KV cache, dropout keys, factors
        of the integrator) as per-layer data, each of them None where it is not used.
        """
        rate = self.shape.dropout

        def f(params, x_BTD, context):
            cache, keys, _ = context.data
            params = gather(self.rules, "layers/0", params, self.compute_dtype)
            (u_BTD, cache), _ = self._f.apply(params, {}, on_batch(x_BTD), context.shared, cache)
            return on_batch(drop(u_BTD, rate, keys, 0)), cache

        def g(params, x_BTD, context):
            _, keys, _ = context.data
            u_BTD = self._feed_forward(params, on_batch(x_BTD))
            u_BTD, *aux = u_BTD if self.shape.experts else (u_BTD,)
            return on_batch(drop(u_BTD, rate, keys, 1)), tuple(aux)

        module = self._adapter
        if module is None:
            return f, g

        def adapter(params, x_BTD, context):
            params = gather(self.rules, "layers/2", params, self.compute_dtype)
            return on_batch(module.apply(params, {}, on_batch(x_BTD))[0]), None

        return f, g, adapter

    def _feed_forward(self, params, x_BTD):
        apply = lambda params, x_BTD: self._g.apply(params, {}, x_BTD)[0]
        if self._in_chunks:
            return by_batch(apply, self.rules, "layers/1", self.compute_dtype)(params, x_BTD)
        return apply(gather(self.rules, "layers/1", params, self.compute_dtype), x_BTD)

    @jax.named_scope("stem")
    def _embed(self, variables, token_BT, first, keys):
        """The input of the first layer. first: the position of the first token."""
        embed_VD = variables.params["embed"]
        # Streams are float32 or wider, and so is the embedding's gradient, which sums over all
        # occurrences of a token.
        dtype = at_least_float32(embed_VD.dtype)
        look_up = lambda embed_VD, token_BT: embed_VD.astype(dtype)[token_BT]
        x_BTD = by_batch(look_up, self.rules, "embed", embed_VD.dtype)(embed_VD, token_BT)
        if self.shape.learned_positions:
            T = token_BT.shape[1]
            self._check_length(T)
            table = variables.params["positions"].astype(dtype)
            x_BTD = x_BTD + on_sequence(lax.dynamic_slice_in_dim(table, first, T))[None]
        return drop(x_BTD, self.shape.dropout, keys, 0)

    def _check_length(self, tokens):
        most = self.shape.learned_positions
        if most and tokens > most:
            raise ValueError(
                f"got a sequence of {tokens} tokens, expected at most {most}: as many as there are "
                "learned positions"
            )

    @jax.named_scope("head")
    def _normalise(self, variables, x_BTD):
        norm = {name: leaf for name, leaf in variables.params["head"].items() if name != "kernel"}
        return self._norm.apply(norm, {}, x_BTD)[0]

    def _head_kernel(self, variables):
        """(path of the kernel for the sharding rules, the kernel [V, D] if tied, else [D, V])."""
        if self.shape.tied:
            return "embed", variables.params["embed"]
        return "head/kernel", variables.params["head"]["kernel"]

    def _logits(self, kernel, x):
        dtype = x.dtype
        x, kernel = x.astype(self.compute_dtype), kernel.astype(self.compute_dtype)
        kernel_DV = kernel.T if self.shape.tied else kernel
        return jnp.matmul(x, kernel_DV, preferred_element_type=dtype)
