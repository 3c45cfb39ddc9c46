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
from oscar_kv.storage.codec import grid_middle
from oscar_kv.storage.layout import PLANES, TILE, PageLayout

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""

ASSEMBLY = tl.constexpr(not INTERPRETED)
"""Whether device functions use inline assembly."""
PAGE = tl.constexpr(PAGE_TOKENS)
TOKENS = tl.constexpr(TILE)
NUM_PLANES = tl.constexpr(PLANES)

CODE_UNIT = tl.constexpr(2.0**24)
"""What :func:`plane` leaves out: a code in the low bits of a float16 is ``code * 2**-24``."""


# Of key channels taken at a time: more would need more registers than a warp has.
_LARGEST_SEGMENT = 64


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
    native_fp8: bool
    """The GPU converts E4M3 in hardware."""
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
    def key_middle(self) -> float:
        """The code that stands for the middle of a key grid."""
        return grid_middle(self.key_bits)

    @property
    def value_middle(self) -> float:
        return grid_middle(self.value_bits)

    @property
    def metadata_bytes(self) -> int:
        return 1 if self.fp8 else 2

    @property
    def padded_head_dim(self) -> int:
        """`head_dim`, rounded up to a power of two."""
        return 1 << (self.head_dim - 1).bit_length()

    @property
    def padded_value_dim(self) -> int:
        return 1 << (self.value_dim - 1).bit_length()

    @property
    def rotates_in_kernel(self) -> bool:
        """Whether decode kernels rotate queries themselves: a power of two, 16 to 256."""
        return self.head_dim in (16, 32, 64, 128, 256)

    @property
    def _segments(self) -> list[int]:
        whole = [_LARGEST_SEGMENT] * (self.head_dim // _LARGEST_SEGMENT)
        rest = self.head_dim % _LARGEST_SEGMENT
        return whole + [1 << bit for bit in range(8, -1, -1) if rest >> bit & 1]

    @property
    def segments(self) -> int:
        """Runs in which key channels are taken, powers of two."""
        return len(self._segments)

    def segment_width(self, index: int) -> int:
        """Channels of a segment."""
        return self._segments[index]

    def segment_begin(self, index: int) -> int:
        return sum(self.segment_width(i) for i in range(index))

    def key_entry(self, kind: int, segment: int) -> int:
        """Where a segment's metadata begin, in numbers: scales (kind 0) or centres (1)."""
        field = (self.key_scale, self.key_centre)[kind] // self.metadata_bytes
        return field + self.segment_begin(segment)

    def group_in_block(self, group: int, block: int) -> bool:
        """Whether a value group has channels in a block of 16."""
        begin, end = block * TILE, min((block + 1) * TILE, self.value_dim)
        return group * self.value_group < end and begin < (group + 1) * self.value_group

    def block_is_split(self, block: int) -> bool:
        """Whether a block of 16 value channels has several groups."""
        return sum(self.group_in_block(g, block) for g in range(self.value_groups)) > 1

    @property
    def stride(self) -> int:
        """Bytes from a page to the next one of the same head."""
        return self.num_kv_heads * self.page_bytes


@lru_cache(maxsize=64)
def page_spec(layout: PageLayout, native_fp8: bool = False) -> PageSpec:
    """The constants of ``layout``; ``native_fp8``: for compute capability 8.9 or more."""
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
        native_fp8=native_fp8,
        shared_scale=config.token_scale == "cross_head",
        scales_per_page=layout.token_scales_per_page,
        page_bytes=layout.page_bytes,
        key_codes=fields["key_codes"].offset,
        key_scale=fields["key_scale"].offset,
        key_centre=fields["key_centre"].offset,
        token_scale=fields["token_scale"].offset,
        value_codes=fields["value_codes"].offset,
        value_grid=fields["value_grid"].offset,
        value_unit=fields["value_unit"].offset,
    )


@triton.jit
def page_pointer(pool, page_id, head, page: tl.constexpr):
    """The first byte of a page; ``page_id`` is an int32 scalar of the block table."""
    return pool + page_id.to(tl.int64) * page.stride + head * page.page_bytes


@triton.jit
def slot(token):
    """Where what is stored per token lies: see ``storage/layout.py``. ``token`` in 0..127."""
    return token % TOKENS * NUM_PLANES + token // TOKENS


@triton.jit
def high_planes(words):
    """Words (int16) with planes 4..7 where planes 0..3 were."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "shr.u32 $0, $1, 8;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        return ((words >> 8) & 0xFF).to(tl.int16)


@triton.jit
def plane(low, high, p: tl.constexpr):
    """Plane ``p`` of words (int16): float16 ``code * 4**(p % 4) / CODE_UNIT``.

    ``low`` are the words, ``high`` what :func:`high_planes` makes of them.

    A code that stays in the low mantissa bits of a 16-bit word *is* that subnormal number, so one
    ``and`` turns two codes into two operands of a matrix unit, which takes subnormals exactly.
    """
    words = low if p < 4 else high
    if ASSEMBLY:
        if p % 4 == 0:
            return _and16(words, "and.b32 $0, $1, 0x00030003;")
        elif p % 4 == 1:
            return _and16(words, "and.b32 $0, $1, 0x000c000c;")
        elif p % 4 == 2:
            return _and16(words, "and.b32 $0, $1, 0x00300030;")
        else:
            return _and16(words, "and.b32 $0, $1, 0x00c000c0;")
    else:
        return (words & (3 << (2 * (p % 4)))).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _and16(words, instruction: tl.constexpr):
    return tl.inline_asm_elementwise(
        instruction, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
    )


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
        if ASSEMBLY:
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
def token_scales(page_of_first_head, head, page: tl.constexpr):
    """Token scales by plane: eight float32 ``[16]``.

    ``page_of_first_head``: the page pointer of head 0; scales shared by heads lie in all of them.
    """
    entry = _entries(NUM_PLANES)
    if page.shared_scale:
        home = entry // page.scales_per_page * page.page_bytes
        offset = home + entry % page.scales_per_page * 2
        scale = (page_of_first_head + offset).to(tl.pointer_type(tl.float16))
    else:
        own = page_of_first_head + head * page.page_bytes
        scale = own.to(tl.pointer_type(tl.float16)) + entry
    return by_plane(tl.load(scale + page.token_scale // 2))


@triton.jit
def key_metadata(base, first, width: tl.constexpr, page: tl.constexpr):
    """``width`` scales or centres of keys from metadata entry ``first`` of the page: float16."""
    if page.fp8:
        words = base.to(tl.pointer_type(tl.int32)) + tl.arange(0, width // 4)
        a, b, c, d = four_e4m3(tl.load(words + first // 4), page)
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (width,))
    else:
        return tl.load(base.to(tl.pointer_type(tl.float16)) + tl.arange(0, width) + first)


@triton.jit
def value_grids(base, group: tl.constexpr, page: tl.constexpr):
    """Grids of a value group: two tuples of eight float32 ``[16]``, scales and centres by plane.

    The unit of the page is left out.
    """
    if page.fp8:
        words = base.to(tl.pointer_type(tl.int32)) + _entries(NUM_PLANES // 2)
        first = page.value_grid // 4 + group * PAGE // 2
        even, even_centre, odd, odd_centre = four_e4m3(tl.load(words + first), page)
        return _interleave(even, odd), _interleave(even_centre, odd_centre)
    else:
        words = base.to(tl.pointer_type(tl.int32)) + _entries(NUM_PLANES)
        both = tl.load(words + (page.value_grid // 4 + group * PAGE))
        return by_plane(half(both)), by_plane(half(both >> 16))


@triton.jit
def _entries(per_row: tl.constexpr):
    return tl.arange(0, TOKENS)[:, None] * per_row + tl.arange(0, per_row)[None, :]


@triton.jit
def half(words):
    """The float16 in the low half of int32 ``words``."""
    return words.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def by_plane(numbers):
    """``[16, 8]`` float16 as eight float32 ``[16]``."""
    even, odd = tl.split(tl.reshape(numbers, (TOKENS, 4, 2)))
    return _interleave(even, odd)


@triton.jit
def _interleave(even, odd):
    """``[16, 4]`` float16 of even and odd planes as eight float32 ``[16]``."""
    p04, p26 = tl.split(tl.reshape(even.to(tl.float32), (TOKENS, 2, 2)))
    p15, p37 = tl.split(tl.reshape(odd.to(tl.float32), (TOKENS, 2, 2)))
    p0, p4 = tl.split(p04)
    p1, p5 = tl.split(p15)
    p2, p6 = tl.split(p26)
    p3, p7 = tl.split(p37)
    return p0, p1, p2, p3, p4, p5, p6, p7


@triton.jit
def four_e4m3(words, page: tl.constexpr):
    """The four E4M3 numbers in each of int32 ``words``, lowest byte first: four float16 tensors."""
    if page.native_fp8:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            .reg .b32 pair;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 pair, low;
            mov.b32 {$0, $1}, pair;
            cvt.rn.f16x2.e4m3x2 pair, high;
            mov.b32 {$2, $3}, pair;
            }""",
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _one_e4m3(words),
            _one_e4m3(words >> 8),
            _one_e4m3(words >> 16),
            _one_e4m3(words >> 24),
        )


@triton.jit
def _one_e4m3(byte):
    moved = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return moved.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
