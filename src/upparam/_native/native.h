/* What every compiled module begins with: Python, and the processors and compilers they are written for. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#endif

#if !defined(__GNUC__)
#error "needs the vector extensions of GCC or Clang; without them upparam uses numpy"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "reads stored elements as little-endian words; without it upparam uses numpy"
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
