// The kernels of a chunk with the vectors that every CPU of the target has: SSE2 on x86-64, NEON on 64-bit ARM.
#define FASTCLIP_ISA portable
#define FASTCLIP_VECTOR_BYTES 16
#include "kernels.h"
