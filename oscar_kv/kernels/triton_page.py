"""A page as Triton kernels see it: compile-time constants, and how its bytes become numbers.

The constants come from :class:`~oscar_kv.storage.layout.PageLayout`, the one definition of a page;
no kernel has an offset of its own. Every helper has an inline-assembly form for the GPU and a plain
form for Triton's interpreter, which knows no assembly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from oscar_kv.config import PAGE_TOKENS
from oscar_kv.storage.layout import PLANES, TILE, PageLayout

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""

_ASSEMBLY = tl.constexpr(not INTERPRETED)
PAGE = tl.constexpr(PAGE_TOKENS)
TOKENS = tl.constexpr(TILE)
NUM_PLANES = tl.constexpr(PLANES)

CODE_UNIT = tl.constexpr(2.0**24)
"""What :func:`plane` leaves out: a code in the low bits of a float16 is ``code * 2**-24``."""


@dataclass(frozen=True)
class PageSpec:
    """A page layout as the constants of a kernel: sizes, and byte offsets of the fields.

    One value of it is passed to a kernel as a single ``tl.constexpr`` argument.
    """

    num_kv_heads: int
    head_dim: int
    value_dim: int
    key_bits: int
    value_bits: int
    key_group: int
    value_group: int
    fp8: bool
    """E4M3 metadata; float16 otherwise."""
    shared_scale: bool
    """Token scales cover all heads and are spread over their pages."""
    scales_per_page: int
    page_bytes: int
    key_codes: int
    key_scale: int
    key_centre: int
    token_scale: int
    value_codes: int
    value_grid: int
    value_unit: int
    """-1 where there is none (the unit is one)."""

    @property
    def key_groups(self) -> int:
        return PAGE_TOKENS // self.key_group

    @property
    def value_groups(self) -> int:
        return self.value_dim // self.value_group

    @property
    def value_blocks(self) -> int:
        """Blocks of 16 value channels, the last one padded."""
        return -(-self.value_dim // TILE)

    @property
    def stride(self) -> int:
        """Bytes from a page to the next one of the same head."""
        return self.num_kv_heads * self.page_bytes


@lru_cache(maxsize=64)
def page_spec(layout: PageLayout) -> PageSpec:
    """The constants of ``layout``."""
    config, fields = layout.config, layout.fields
    return PageSpec(
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        value_dim=layout.value_dim,
        key_bits=config.key_bits,
        value_bits=config.value_bits,
        key_group=config.key_group,
        value_group=layout.value_group,
        fp8=config.metadata == "fp8",
        shared_scale=config.token_scale == "cross_head",
        scales_per_page=layout.token_scales_per_page,
        page_bytes=layout.page_bytes,
        key_codes=fields["key_codes"].offset,
        key_scale=fields["key_scale"].offset,
        key_centre=fields["key_centre"].offset,
        token_scale=fields["token_scale"].offset,
        value_codes=fields["value_codes"].offset,
        value_grid=fields["value_grid"].offset,
        value_unit=fields["value_unit"].offset if "value_unit" in fields else -1,
    )


@triton.jit
def page_pointer(pool, page_id, head, page: tl.constexpr):
    """The first byte of a page; ``page_id`` is an int32 scalar of the block table."""
    return pool + page_id.to(tl.int64) * page.stride + head * page.page_bytes


@triton.jit
def slot(token):
    """Where what is stored per token lies: see ``storage/layout.py``. ``token`` in 0..127."""
    return token // 32 * 32 + token % 16 * 2 + token // 16 % 2


@triton.jit
def high_planes(words):
    """Words (int16) with planes 4..7 where planes 0..3 were."""
    if _ASSEMBLY:
        return tl.inline_asm_elementwise(
            "shr.u32 $0, $1, 8;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        return ((words >> 8) & 0xFF).to(tl.int16)


@triton.jit
def plane(words, p: tl.constexpr):
    """Plane ``p`` in 0..3 of ``words`` (int16): float16 ``code * 4**p / CODE_UNIT``.

    A code that stays in the low mantissa bits of a 16-bit word *is* that subnormal number, so one
    ``and`` turns two codes into two operands of a matrix unit, which takes subnormals exactly.
    """
    if _ASSEMBLY:
        if p == 0:
            return _and16(words, "and.b32 $0, $1, 0x00030003;")
        elif p == 1:
            return _and16(words, "and.b32 $0, $1, 0x000c000c;")
        elif p == 2:
            return _and16(words, "and.b32 $0, $1, 0x00300030;")
        else:
            return _and16(words, "and.b32 $0, $1, 0x00c000c0;")
    else:
        return (words & (3 << (2 * p))).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _and16(words, instruction: tl.constexpr):
    return tl.inline_asm_elementwise(
        instruction, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def load_metadata(pointer, page: tl.constexpr):
    """Scales or centres at ``pointer`` plus element offsets: see :func:`metadata_pointer`."""
    return decode_metadata(tl.load(pointer), page)


@triton.jit
def metadata_pointer(base, offset: tl.constexpr, page: tl.constexpr):
    """A typed pointer to the metadata field at ``offset`` bytes of the page at ``base``."""
    if page.fp8:
        return base + offset
    else:
        return (base + offset).to(tl.pointer_type(tl.float16))


@triton.jit
def decode_metadata(raw, page: tl.constexpr):
    """float16 numbers of raw metadata: E4M3 bytes (uint8), or float16 as they are.

    Seven bits of an E4M3 number, moved to the exponent and mantissa of a float16, are that number
    over 256, subnormals included. No conversion instruction is needed, so Ampere does the same.
    """
    if page.fp8:
        if _ASSEMBLY:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 lo, hi, m;
                prmt.b32 lo, $2, 0, 0x1404;
                prmt.b32 hi, $2, 0, 0x3424;
                shr.u32 m, lo, 1;
                and.b32 m, m, 0x3f803f80;
                lop3.b32 lo, lo, 0x80008000, m, 0xea;
                shr.u32 m, hi, 1;
                and.b32 m, m, 0x3f803f80;
                lop3.b32 hi, hi, 0x80008000, m, 0xea;
                mov.b32 m, 0x5c005c00;
                mul.rn.f16x2 $0, lo, m;
                mul.rn.f16x2 $1, hi, m;
                }""",
                "=r,=r,r",
                [raw],
                dtype=tl.float16,
                is_pure=True,
                pack=4,
            )
        else:
            bits = raw.to(tl.int16)
            moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            return moved.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    else:
        return raw


@triton.jit
def encode_e4m3(x):
    """E4M3 bytes (uint8) of float32 ``x``, to nearest even, saturating.

    The inverse of :func:`decode_metadata`, in integer arithmetic so that it runs on every GPU.
    """
    magnitude = tl.minimum(tl.abs(x), 448.0)
    # Adding a power of two whose last mantissa bit weighs as much as E4M3's rounds to it.
    exponent = (magnitude.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.maximum(exponent, -6)
    magic = ((exponent + 20 + 127) << 23).to(tl.float32, bitcast=True)
    rounded = ((magnitude + magic) - magic).to(tl.int32, bitcast=True)
    # A normal E4M3 number: its exponent is 120 less than float32's.
    normal = (rounded >> 20) - (120 << 3)
    tiny = ((magnitude + 16384.0) - 16384.0) * 512.0
    code = tl.where((rounded >> 23) >= 121, normal, tiny.to(tl.int32))
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)
