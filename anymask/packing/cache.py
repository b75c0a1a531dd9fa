"""What is remembered between calls of `attention` and its stand-ins: masks that they packed, or built of tensors."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import _C, Tensor
from torch._C import _functorch

from anymask.block_mask import BlockMask
from anymask.mask import Mask
from anymask.mask.expr import TileGrid, fold
from anymask.mask.program import program_of, refuse_mapped_functions
from anymask.packing import pack

# None, where tensors are found to be no mask
Built = TypeVar("Built", Mask, Mask | None)

MAX_ENTRIES = 64
# of packed masks; the last one is kept whatever its size
MAX_BYTES = 2**30
# masks of given tensors, which hold a few numbers for each token
MAX_BUILT = 16


_PLAIN = (Tensor, torch.nn.Parameter)


class TensorKey(NamedTuple):
    """What a tensor is. Equal keys of tensors that are alive mean the same values."""

    # addresses of the tensor that it is a view of, or of itself, and of its storage
    base: int
    storage: int
    data_ptr: int
    version: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class MaskKey(NamedTuple):
    """What a packed mask depends on."""

    # the expression without its tensors, see `Program`
    nodes: tuple[int, ...]
    numbers: tuple[int, ...]
    tensors: tuple[TensorKey, ...]
    q_len: int
    kv_len: int
    device: torch.device


# what the mask of a call that was given a tensor depends on: the fields of its `TensorKey`, the shape of q, kv_len, and
# the device of q; it is made at every call, where a record takes as long as all the rest
CallKey: TypeAlias = "tuple[tuple[Any, ...], torch.Size, int, torch.device]"


class BuiltKey(NamedTuple):
    """What a mask that was built of given tensors depends on."""

    # the builder, and its arguments that are no tensors
    what: tuple[Hashable, ...]
    tensors: tuple[TensorKey, ...]
    # the CUDA stream on which it was built; 0 elsewhere
    stream: int


@dataclass(frozen=True)
class _Built:
    mask: Mask | None
    storages: tuple[weakref.ref[Any], ...]


@dataclass(eq=False)
class _Entry:
    key: MaskKey
    packed: BlockMask
    # weak, and of storages: a weak reference to a tensor forbids `torch.utils.swap_tensors`
    storages: tuple[weakref.ref[Any], ...]
    # the CUDA stream on which it was packed; 0 elsewhere
    stream: int
    # grows with each use of any entry
    used: int


class MaskCache:
    """Masks packed for `attention`, of which the least recently used go first.

    A mask is found again by its expression, the lengths, the device, and what each of its tensors *is*: storage, place
    in it, sizes, strides, dtype and version. So `mask[:, None]` made anew in each layer is one mask, and so are
    `causal() & m` and `causal() & m` with one `m` that `document(ids)` returned; `document(ids)` called twice is two,
    as each copies what it is given. A write to a tensor counts its version up, a parameter that moves has another
    storage: both are another mask.

    A caller that builds a mask anew at each call, of tensors that stay, has the `Mask` itself remembered by what those
    tensors are, under the same rules: `build`.

    - An entry goes with the first of its storages, with a write, when `MAX_ENTRIES` or `MAX_BYTES` are reached, or by
      `forget`. It keeps no tensor of the user alive.
    - Not remembered: `from_function`, as what the function reads may change; tensors made in inference mode, which
      count no version; subclasses of `Tensor`; and a tensor whose storage others than its own views hold, as they may
      write to it with a count of their own (`.data`; `detach()` is taken for one too).
    - Not seen are writes that no version counts: through `.data`, NumPy, DLPack or shared memory, by collectives of
      `torch.distributed` (DDP's sync of buffers too), replays of CUDA graphs, and kernels of other libraries. Call
      `forget`, or `pack` the mask, after such a write.
    - In a CUDA graph that is being captured only masks without tensors are looked up, and they are kept for good:
      a replay reads them, and would not see a new value of a tensor.
    - Threads may call at once; two that miss the same mask both pack it, and both results are the same.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        # a storage that dies while the lock is held takes it again
        self._lock = threading.RLock()
        self._entries: dict[MaskKey, _Entry] = {}
        self._built: OrderedDict[BuiltKey, _Built] = OrderedDict()
        # what was packed of tensors that fitted a call: gone when `_entries`, which alone holds entries, has it no more
        self._calls: OrderedDict[CallKey, weakref.ref[_Entry]] = OrderedDict()
        self._ticks = itertools.count()
        self._captured: list[BlockMask] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed masks that are remembered."""
        with self._lock:
            return sum(entry.packed.nbytes for entry in list(self._entries.values()))

    def forget(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()
            self._built.clear()
            self._calls.clear()

    def recall(self, mask: Tensor, q: Tensor, kv_len: int) -> tuple[CallKey | None, BlockMask | None]:
        """The key of a call with this mask, and what an earlier call with that key packed; each None if there is none.

        It spares checks that an equal call has passed, and a mask of the tensor.
        """
        if _C._are_functorch_transforms_active():
            return None, None
        device, stream = q.device, 0
        if q.is_cuda:
            stream = _C._cuda_getCurrentRawStream(device.index)
            # a capture never has the default stream, which is 0
            if stream and torch.cuda.is_current_stream_capturing():
                return None, None
        of_mask = _identity(mask)
        if of_mask is None:
            return None, None
        call = of_mask, q.shape, kv_len, device
        # nothing to lock: whoever calls holds the tensor, and with it the storages that an entry goes with
        found = self._calls.get(call)
        entry = None if found is None else found()
        if entry is None:
            return call, None
        entry.used = next(self._ticks)
        if entry.stream != stream:
            _record_stream(entry, device)
        return call, entry.packed

    def learn(self, call: CallKey, mask: Mask) -> None:
        """An equal call has this mask, which was packed."""
        _, q_shape, kv_len, device = call
        program = program_of(mask)
        assert program is not None
        keys = [key for key in map(_tensor_key, program.tensors) if key is not None]
        if len(keys) < len(program.tensors):
            return
        with self._lock:
            entry = self._entries.get(MaskKey(program.nodes, program.numbers, tuple(keys), q_shape[2], kv_len, device))
            if entry is not None:
                self._calls[call] = weakref.ref(entry)
            while len(self._calls) > self._max_entries:
                self._calls.popitem(last=False)

    def build(self, what: tuple[Hashable, ...], tensors: tuple[Tensor, ...], make: Callable[[], Built]) -> Built:
        """`make()`, called now or before: a mask of what `tensors` hold, and of `what` says all the rest.

        Equal masks are one object, so that `pack` finds it again.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the mask would have to be built.
        """
        if _C._are_functorch_transforms_active():
            tensors = tuple(map(_unwrapped_tensor, tensors))
        keys = [key for key in map(_tensor_key, tensors) if key is not None]
        device = next((t.device for t in tensors if t.device.type == "cuda"), None)
        key = BuiltKey(what, tuple(keys), 0 if device is None else _C._cuda_getCurrentRawStream(device.index))
        known = len(keys) == len(tensors)
        with self._lock:
            built = self._built.get(key) if known else None
            if built is not None:
                self._built.move_to_end(key)
                found: Any = built.mask
                return cast(Built, found)
        if device is not None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "mask would be built from tensors, which waits for the GPU, while a CUDA graph is being captured; "
                "allowed is a BlockMask that was packed before"
            )
        with _apart():
            mask = make()
        if known:
            storages = tuple(weakref.ref(t.untyped_storage(), partial(self._drop_built, key)) for t in tensors)
            with self._lock:
                for old in _older(self._built, key.tensors):
                    self._built.pop(old, None)
                self._built[key] = _Built(mask, storages)
                while len(self._built) > MAX_BUILT:
                    self._built.popitem(last=False)
        return mask

    def pack(
        self, mask: Mask, q_len: int, kv_len: int, device: torch.device, check: Callable[[], None] | None = None
    ) -> BlockMask:
        """`mask` packed, now or before. `check` is called before it is packed, and may raise.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the mask would have to be packed.
        """
        if _C._are_functorch_transforms_active():
            mask = _unwrapped(mask)
            refuse_mapped_functions(mask, TileGrid(q_len, kv_len, device))
        program = program_of(mask)
        leaves = () if program is None else program.tensors
        keys = [key for key in map(_tensor_key, leaves) if key is not None]
        on_cuda = device.type == "cuda"
        capturing = on_cuda and torch.cuda.is_current_stream_capturing()
        # what a function has captured may change
        if program is None or len(keys) < len(leaves) or (capturing and keys):
            return _pack(mask, q_len, kv_len, device, capturing, check)
        key = MaskKey(program.nodes, program.numbers, tuple(keys), q_len, kv_len, device)
        entry = self._entries.get(key)
        stream = _C._cuda_getCurrentRawStream(device.index) if on_cuda else 0
        if entry is None:
            packed = _pack(mask, q_len, kv_len, device, capturing, check)
            if on_cuda:
                # later calls may run on other streams
                torch.cuda.current_stream(device).synchronize()
            storages = tuple(weakref.ref(t.untyped_storage(), partial(self._drop, key)) for t in leaves)
            entry = _Entry(key, packed, storages, stream, next(self._ticks))
            self._add(entry)
        entry.used = next(self._ticks)
        if capturing:
            self._captured.append(entry.packed)
        if entry.stream != stream:
            _record_stream(entry, device)
        return entry.packed

    def _add(self, entry: _Entry) -> None:
        with self._lock:
            for old in _older(self._entries, entry.key.tensors):
                self._entries.pop(old, None)
            self._entries[entry.key] = entry
            while len(self._entries) > 1 and (len(self._entries) > self._max_entries or self.nbytes > self._max_bytes):
                oldest = min(list(self._entries.values()), key=lambda entry: entry.used)
                self._entries.pop(oldest.key, None)

    def _drop(self, key: MaskKey, _: weakref.ref[Any]) -> None:
        with self._lock:
            self._entries.pop(key, None)

    def _drop_built(self, key: BuiltKey, _: weakref.ref[Any]) -> None:
        with self._lock:
            self._built.pop(key, None)


def _record_stream(entry: _Entry, device: torch.device) -> None:
    """The current stream uses an entry that was packed on another one."""
    for t in entry.packed.tensors():
        t.record_stream(torch.cuda.current_stream(device))


def _older(entries: Iterable[Any], tensors: tuple[TensorKey, ...]) -> list[Any]:
    """Keys of older versions of tensors, which can never be asked for again."""
    now = {(t.base, t.storage): t.version for t in tensors}
    return [
        old for old in list(entries) if any(now.get((t.base, t.storage), t.version) != t.version for t in old.tensors)
    ]


def _pack(
    mask: Mask,
    q_len: int,
    kv_len: int,
    device: torch.device,
    capturing: bool,
    check: Callable[[], None] | None,
) -> BlockMask:
    if capturing:
        raise RuntimeError(
            "mask would be packed, which waits for the GPU, while a CUDA graph is being captured; allowed are a "
            "BlockMask that was packed before, and a mask without tensors that was used before"
        )
    with _apart():
        if check is not None:
            check()
        return pack(mask, q_len=q_len, kv_len=kv_len, device=device)


@contextmanager
def _apart() -> Iterator[None]:
    """Nothing records, watches or transforms what packing does: results serve later calls, which may run elsewhere."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if _C._len_torch_dispatch_stack():
            # selective checkpointing counts operations, and must find as many when it computes again
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        if _C._are_functorch_transforms_active():
            # what is made inside a transform is a wrapper that dies with it
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        yield


def _unwrapped(mask: Mask) -> Mask:
    """The mask of the tensors inside those that a transform of torch.func has wrapped."""
    inner: Mask = fold(mask, _unwrapped_leaf, lambda node, *operands: node.of_masks(*operands))
    return inner


def _unwrapped_leaf(leaf: Mask) -> Mask:
    inner = {name: _unwrapped_tensor(t) for name, t in vars(leaf).items() if isinstance(t, Tensor)}
    return replace(cast(Any, leaf), **inner) if inner else leaf


def _unwrapped_tensor(t: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            raise NotImplementedError(
                "mask is made of a tensor that torch.vmap maps, and whose values are needed; allowed is a bool tensor"
            )
        t = _functorch.get_unwrapped(t)
    return t


def _tensor_key(t: Tensor) -> TensorKey | None:
    """The key of a tensor, or None if its values may change without a trace."""
    fields = _identity(t)
    return None if fields is None else TensorKey._make(fields)


def _identity(t: Tensor) -> tuple[Any, ...] | None:
    """The fields of the key of a tensor, or None."""
    if type(t) not in _PLAIN:
        return None
    try:
        version = t._version
    except RuntimeError:
        # made in inference mode
        return None
    base: Any = t._base
    if base is None:
        base = t
    held = base.untyped_storage()
    storage = held._cdata
    # one count is of `held`; each view of a tensor holds both of them
    if _C._storage_Use_Count(storage) - 1 > base._use_count():
        return None
    return base._cdata, storage, t.data_ptr(), version, t.dtype, t.shape, t.stride()


# the masks that `attention` remembers
masks = MaskCache()


def forget() -> None:
    """Forget every mask that `attention` has packed, or built of other libraries' arguments, by itself.

    Call it after a write to a mask that PyTorch does not count: through `.data`, NumPy, DLPack or shared memory, by a
    collective of `torch.distributed`, by the replay of a CUDA graph, or by a kernel of another library.
    """
    masks.forget()
