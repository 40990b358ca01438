/* The library is loaded by ctypes; setuptools wants this of an extension module. Importing it fails. */
#include "native.h"

EXPORTED void *PyInit__native(void);
EXPORTED void *PyInit__native(void) { return NULL; }

/* Whether kept values can be in half precision. */
EXPORTED int64_t hf_backrazor_has_float16(void);
EXPORTED int64_t hf_backrazor_has_float16(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}
