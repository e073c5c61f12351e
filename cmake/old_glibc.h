/* Included before every source of a wheel for Linux, so that one built on a newer system runs with glibc 2.28, too: what
 * glibc has a second, newer version of since then is bound to the older one, which computes the same. */
#include <limits.h> /* any header of glibc tells which library this is */
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver pow, pow@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver pow, pow@GLIBC_2.17");
#endif
