// The kernels of a chunk with the vectors that every target of the compiler has (SSE2, NEON, ...).
#define FASTCLIP_ISA portable
#define FASTCLIP_VECTOR_BYTES 16
#include "kernels.h"
