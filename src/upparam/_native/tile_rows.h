/* What a tile kernel does to one row of a block: rounding to a narrow type, and whether float sums decide it. Included once per instruction set by
 * tile.c, before tile_kernels.h, with the macros that file tells of. Vectors are GCC/Clang vector extensions: the compiler maps them to the set
 * that TARGET names. What is defined here is undefined at the end of tile_kernels.h.
 */

#define WIDE (2 * LANES)

typedef float NAME(vf) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(vu) __attribute__((vector_size(LANES * 4)));
typedef int32_t NAME(vi) __attribute__((vector_size(LANES * 4)));
typedef uint16_t NAME(vh) __attribute__((vector_size(LANES * 2)));
typedef uint16_t NAME(vw) __attribute__((vector_size(LANES * 4)));
typedef uint8_t NAME(vb) __attribute__((vector_size(LANES)));
typedef double NAME(vd) __attribute__((vector_size(LANES * 4)));
typedef uint64_t NAME(vul) __attribute__((vector_size(LANES * 4)));
typedef int64_t NAME(vil) __attribute__((vector_size(LANES * 4)));
typedef float NAME(vfs) __attribute__((vector_size(LANES * 2)));
typedef uint32_t NAME(vus) __attribute__((vector_size(LANES * 2)));

#define VF NAME(vf)
#define VU NAME(vu)
#define VI NAME(vi)
#define VH NAME(vh)
#define VB NAME(vb)
#define VW NAME(vw)
#define VD NAME(vd)
#define VUL NAME(vul)
#define VIL NAME(vil)
#define VFS NAME(vfs)
#define VUS NAME(vus)

#ifndef LANE_BITS
#define LANE_BITS(mask) NAME(lane_bits)(mask)
#define NARROW(codes) __builtin_convertvector(codes, VH)
TARGET static inline uint32_t NAME(lane_bits)(VU mask)
{
    uint32_t lanes[LANES], bits = 0;
    memcpy(lanes, &mask, sizeof mask);
    for (int lane = 0; lane < LANES; lane++)
        bits |= (lanes[lane] & 1u) << lane;
    return bits;
}
#endif

#ifndef COUNT
#define COUNT(mask) NAME(count)(mask)
#define ANY(mask) NAME(count)(mask)
#define MARKS(mask) NAME(marks)(mask)
TARGET static inline long NAME(count)(VW mask)
{
    uint64_t words[sizeof mask / 8], sum = 0;
    memcpy(words, &mask, sizeof mask);
    for (unsigned long n = 0; n < sizeof mask / 8; n++)
        sum += words[n] & 0x0001000100010001u;
    return (long)(sum * 0x0001000100010001u >> 48);
}

TARGET static inline uint32_t NAME(marks)(VW mask)
{
    uint16_t lanes[WIDE];
    uint32_t bits = 0;
    memcpy(lanes, &mask, sizeof mask);
    for (int lane = 0; lane < WIDE; lane++)
        bits |= (uint32_t)(lanes[lane] & 1u) << lane;
    return bits;
}
#endif

/* Codes of fp16 values of magnitude a (sign removed), rounded to nearest even. Normal results by rounding the mantissa in place,
 * subnormal ones by adding 0.5, whose unit in the last place is the spacing of fp16 subnormals. */
TARGET static inline VU NAME(half_code)(VF a)
{
#ifdef HALF_DOWN
    return HALF_DOWN(a);
#else
    VU bits = (VU)a;
    VU normal = (bits + 0xFFFu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
    VF shifted = a + 0.5f;
    VU small = (VU)shifted - 0x3F000000u;
    VU is_small = (VU)(a < 6.103515625e-05f);
    return (normal & ~is_small) | (small & is_small);
#endif
}

TARGET static inline VF NAME(half_value)(VU code)
{
#ifdef HALF_UP
    return HALF_UP(code);
#else
    VU magnitude = (code & 0x7FFFu) << 13;
    VF value = (VF)magnitude * 5.192296858534828e+33f; /* 2^112: moves the exponent, subnormals included */
    return (VF)((VU)value | ((code & 0x8000u) << 16));
#endif
}

#ifndef ROW_OF_BFLOAT
/* One row of a bfloat16 block: 2 * LANES weights as LANES words, whose lower halves are the even columns and upper halves the odd ones.
 *
 * The true sum lies within `reach` of each lane's. An element is certain where both ends of that interval round alike; ends are moved
 * outward by 4 units in the last place of float32 for the rounding of the sum and of the ends themselves. Where both ends agree no tie
 * lies between them, so rounding ties away from zero is as good as to even; ends on two sides of zero never agree. */
TARGET static inline __attribute__((always_inline)) uint32_t NAME(bfloat_row)(uint16_t *w, const VF *sum, float reach, int exact, long *changed)
{
    const VU sign = 0x80000000u - (VU){0}, upper = 0xFFFF0000u - (VU){0};
    VU old;
    memcpy(&old, w, sizeof old);
    VF v0 = (VF)(old << 16) + sum[0], v1 = (VF)(old & upper) + sum[1];
    VU code;
    VW doubt;
    if (exact) {
        const VU bits = (VU)(reach - (VF){0});
        VF s0 = (VF)(((VU)v0 & sign) | bits), s1 = (VF)(((VU)v1 & sign) | bits);
        code = ((VU)(v0 + s0) + 0x8004u) >> 16 | (((VU)(v1 + s1) + 0x8004u) & upper);
        VU low = ((VU)(v0 - s0) + 0x7FFCu) >> 16 | (((VU)(v1 - s1) + 0x7FFCu) & upper);
        doubt = (VW)((VW)code != (VW)low);
    } else {
        code = ((VU)v0 + 0x7FFFu + ((VU)v0 >> 16 & 1u)) >> 16 | (((VU)v1 + 0x7FFFu + ((VU)v1 >> 16 & 1u)) & upper);
        doubt = (VW){0};
    }
    doubt |= (VW)(((VW)code << 1) >= 2 * 0x7F7C); /* nearly too large, too large, or NaN */
    VW kept = ((VW)code & ~doubt) | ((VW)old & doubt), differs = (VW)(kept != (VW)old);
    *changed += COUNT(differs);
    memcpy(w, &kept, sizeof kept);
    return ANY(doubt) ? MARKS(doubt) : 0;
}
#define ROW_OF_BFLOAT NAME(bfloat_row)
#endif

#ifndef ROW_OF_HALF
/* One row of a float16 block, by magnitudes; an end beyond zero carries a sign bit and never agrees. */
TARGET static inline __attribute__((always_inline)) uint32_t NAME(half_row)(uint16_t *w, const VF *sum, float reach, int exact, long *changed)
{
    uint32_t mark = 0;
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        VH stored;
        memcpy(&stored, w + j * LANES, sizeof stored);
        VU old = __builtin_convertvector(stored, VU);
        VU bits = (VU)(NAME(half_value)(old) + sum[j]);
        VU sign = bits & 0x80000000u;
        VF a = (VF)(bits ^ sign);
        VU doubt = (VU)(a <= 65472.0f) ^ 0xFFFFFFFFu; /* also true for NaN */
        VU code;
        if (exact) {
            VI low = (VI)(a - reach) - 4;
            code = NAME(half_code)((VF)((VI)(a + reach) + 4));
            doubt |= (VU)(NAME(half_code)((VF)low) != code) | (VU)(low < 0);
        } else
            code = NAME(half_code)(a);
        code |= sign >> 16;
#ifndef HALF_UP
        doubt |= (VU)((old & 0x7C00u) == 0x7C00u); /* Inf and NaN came out of half_value as large numbers */
#endif
        code = (code & ~doubt) | (old & doubt);
        *changed += __builtin_popcount(LANE_BITS((VU)(code != old)));
        mark |= (uint32_t)LANE_BITS(doubt) << (j * LANES);
        VH out = NARROW(code);
        memcpy(w + j * LANES, &out, sizeof out);
    }
    return mark;
}
#define ROW_OF_HALF NAME(half_row)
#endif

/* Codes of numbers of magnitude a in a format of 8 bits, rounded to nearest even. */
TARGET static inline __attribute__((always_inline)) VU NAME(eight_code)(VF a, int kind)
{
    VU bits = (VU)a;
    VU normal = ((bits + ((1u << (DROPPED(kind) - 1)) - 1u) + (bits >> DROPPED(kind) & 1u)) >> DROPPED(kind)) - REBIAS(kind);
    VU small = (VU)(a + LEAST(kind)) - LEAST_BITS(kind);
    VU is_small = (VU)(a < NORMAL(kind));
    return (normal & ~is_small) | (small & is_small);
}

/* One row of a block of 8 bits, by magnitudes as `half_row`. */
TARGET static inline __attribute__((always_inline)) uint32_t NAME(eight_row)(uint8_t *w, const VF *sum, float reach, int kind, int exact, long *changed)
{
    uint32_t mark = 0;
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        VB stored;
        memcpy(&stored, w + j * LANES, sizeof stored);
        VU old = __builtin_convertvector(stored, VU), size = old & 0x7Fu;
        VU least = (VU)(size < (1u << (23 - DROPPED(kind)))); /* below the smallest normal number: as what is above it by so much */
        VF value = (VF)((size << DROPPED(kind)) + REBIAS_BITS(kind) + (least & 1u << 23)) - (VF)(least & (VU)(NORMAL(kind) - (VF){0}));
        VU bits = (VU)((VF)((VU)value | (old & 0x80u) << 24) + sum[j]);
        VU sign = bits & 0x80000000u;
        VF a = (VF)(bits ^ sign);
        VU doubt = (VU)(a <= SURE(kind)) ^ 0xFFFFFFFFu; /* also true for NaN */
        VU code;
        if (exact) {
            VI low = (VI)(a - reach) - 4;
            code = NAME(eight_code)((VF)((VI)(a + reach) + 4), kind);
            doubt |= (VU)(NAME(eight_code)((VF)low, kind) != code) | (VU)(low < 0);
        } else
            code = NAME(eight_code)(a, kind);
        code |= sign >> 24;
        doubt |= (VU)(size > (kind == E4M3 ? 0x7Eu : 0x7Bu)); /* what is no number came out as a large one */
        code = (code & ~doubt) | (old & doubt);
        *changed += __builtin_popcount(LANE_BITS((VU)(code != old)));
        mark |= (uint32_t)LANE_BITS(doubt) << (j * LANES);
        stored = __builtin_convertvector(code, VB);
        memcpy(w + j * LANES, &stored, sizeof stored);
    }
    return mark;
}

/* Codes of numbers of magnitude a in a narrow type, rounded to nearest even; what is too large gets the code that is for that. */
TARGET static inline __attribute__((always_inline)) VU NAME(code_of)(VF a, int kind)
{
    if (kind == BFLOAT)
        return ((VU)a + 0x7FFFu + ((VU)a >> 16 & 1u)) >> 16;
    VU code = kind == HALF ? NAME(half_code)(a) : NAME(eight_code)(a, kind), last = (kind == HALF ? 0x7C00u : LAST(kind)) - (VU){0};
    VU over = (VU)(code > last);
    return (last & over) | (code & ~over);
}

/* One row of narrow codes of what is given in float32, plus the sums. Marked elements get the code of what is given. All is finite. */
TARGET static inline __attribute__((always_inline)) uint32_t NAME(given_row)(void *w, const float *given, const VF *sum, float reach, int kind, long *changed)
{
    const uint32_t shift = kind > SINGLE ? 24 : 16;
    uint32_t mark = 0;
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        VF value;
        memcpy(&value, given + j * LANES, sizeof value);
        VU sign = (VU)value & 0x80000000u;
        VU plain = NAME(code_of)((VF)((VU)value ^ sign), kind) | sign >> shift;
        VU bits = (VU)(value + sum[j]);
        sign = bits & 0x80000000u;
        VF a = (VF)(bits ^ sign);
        VI low = (VI)(a - reach) - 4;
        VU code = NAME(code_of)((VF)((VI)(a + reach) + 4), kind);
        VU doubt = (VU)(a <= (kind == BFLOAT ? 3.3e38f : kind == HALF ? 65472.0f : SURE(kind))) ^ 0xFFFFFFFFu;
        doubt |= (VU)(NAME(code_of)((VF)low, kind) != code) | (VU)(low < 0);
        code |= sign >> shift;
        code = (code & ~doubt) | (plain & doubt);
        *changed += __builtin_popcount(LANE_BITS((VU)(code != plain)));
        mark |= (uint32_t)LANE_BITS(doubt) << (j * LANES);
        if (kind > SINGLE) {
            VB out = __builtin_convertvector(code, VB);
            memcpy((uint8_t *)w + j * LANES, &out, sizeof out);
        } else {
            VH out = NARROW(code);
            memcpy((uint16_t *)w + j * LANES, &out, sizeof out);
        }
    }
    return mark;
}
