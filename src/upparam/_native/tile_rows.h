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

/* Codes in a narrow type of numbers of magnitude a, rounded to nearest even: normal ones by rounding the mantissa in place, subnormal ones by
 * adding what has their spacing as its unit in the last place. What is too large gets any code that is no number's. */
TARGET static inline __attribute__((always_inline)) VU NAME(code_of)(VF a, int kind)
{
    VU bits = (VU)a;
    if (kind == BFLOAT)
        return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
#ifdef HALF_DOWN
    if (kind == HALF)
        return HALF_DOWN(a);
#endif
    VU normal = (bits + ((1u << (DROPPED(kind) - 1)) - 1u) + (bits >> DROPPED(kind) & 1u) - REBIAS_BITS(kind)) >> DROPPED(kind);
    VU small = (VU)(a + LEAST(kind)) - LEAST_BITS(kind);
    VU is_small = (VU)(a < NORMAL(kind));
    return (normal & ~is_small) | (small & is_small);
}

/* The numbers that codes stand for; what stands for none comes out as infinite, NaN, or a large number. */
TARGET static inline __attribute__((always_inline)) VF NAME(value_of)(VU code, int kind)
{
#ifdef HALF_UP
    if (kind == HALF)
        return HALF_UP(code);
#endif
    VU size = code & (SIGN(kind) - 1u), sign = (code & SIGN(kind)) << (EIGHT(kind) ? 24 : 16);
    VU least = (VU)(size < (1u << (23 - DROPPED(kind)))); /* below the smallest normal number: as what is above it by so much */
    VF value = (VF)((size << DROPPED(kind)) + REBIAS_BITS(kind) + (least & 1u << 23)) - (VF)(least & (VU)(NORMAL(kind) - (VF){0}));
    return (VF)((VU)value | sign);
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

/* One row of a narrow block, by magnitudes; an end beyond zero carries a sign bit and never agrees. The weights are the codes at w or, with
 * GIVEN, float32 at `given`, all finite; marked elements then get the code of what is given. */
TARGET static inline __attribute__((always_inline)) uint32_t NAME(narrow_row)(
    void *w, const float *given, const VF *sum, float reach, int kind, int exact, long *changed)
{
    const int to = kind & ~GIVEN, shift = EIGHT(to) ? 24 : 16;
    uint32_t mark = 0;
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        char *const place = (char *)w + j * LANES * (EIGHT(to) ? 1 : 2);
        VB bytes;
        VH halves;
        VF value;
        VU old;
        if (kind & GIVEN) {
            memcpy(&value, given + j * LANES, sizeof value);
            VU sign = (VU)value & 0x80000000u, last = (to == BFLOAT ? 0x7F80u : LAST(to)) - (VU){0};
            old = NAME(code_of)((VF)((VU)value ^ sign), to);
            VU over = (VU)(old > last);
            old = (last & over) | (old & ~over) | sign >> shift;
        } else {
            if (EIGHT(to))
                memcpy(&bytes, place, sizeof bytes), old = __builtin_convertvector(bytes, VU);
            else
                memcpy(&halves, place, sizeof halves), old = __builtin_convertvector(halves, VU);
            value = NAME(value_of)(old, to);
        }
        VU bits = (VU)(value + sum[j]), sign = bits & 0x80000000u;
        VF a = (VF)(bits ^ sign);
        VU doubt = (VU)(a <= SURE(to)) ^ 0xFFFFFFFFu; /* also true for NaN */
        VU code;
        if (exact) {
            VI low = (VI)(a - reach) - 4;
            code = NAME(code_of)((VF)((VI)(a + reach) + 4), to);
            doubt |= (VU)(NAME(code_of)((VF)low, to) != code) | (VU)(low < 0);
        } else
            code = NAME(code_of)(a, to);
        code |= sign >> shift;
        if (!(kind & GIVEN)) /* what is no number may have come out as a large one */
            doubt |= (VU)((old & (SIGN(to) - 1u)) > NUMBERS(to));
        code = (code & ~doubt) | (old & doubt);
        *changed += __builtin_popcount(LANE_BITS((VU)(code != old)));
        mark |= (uint32_t)LANE_BITS(doubt) << (j * LANES);
        if (EIGHT(to))
            bytes = __builtin_convertvector(code, VB), memcpy(place, &bytes, sizeof bytes);
        else
            halves = NARROW(code), memcpy(place, &halves, sizeof halves);
    }
    return mark;
}
#ifndef ROW_OF_HALF
#define ROW_OF_HALF(w, sum, reach, exact, changed) NAME(narrow_row)(w, 0, sum, reach, HALF, exact, changed)
#endif
