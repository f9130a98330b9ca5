/* A CUDA driver of paper: Triton's own driver and launchers load it and find an H100 that computes
   nothing. It keeps every launch, and refuses what a real driver refuses: a pointer that is not the
   device's, a grid or a block beyond its limits, shared memory that was not allowed, and code that
   is loaded while a stream is recorded. */
#include "cuda.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MOST 4096
#define SHARED 232448

typedef struct { char name[128]; int shared; } Function;
typedef struct {
  const char *name;
  unsigned grid[3], block, shared, attributes;
  uint64_t stream;
} Launch;

EXPORT Launch paper_launches[MOST];
EXPORT int paper_count, paper_loads, paper_recording;
EXPORT uint64_t paper_tag;

EXPORT CUresult cuGetErrorString(CUresult e, const char **s) {
  *s = e == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "not permitted when stream is capturing"
     : e == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "out of memory";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDriverGetVersion(int *v) { *v = 13000; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 1 << 20; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit l, size_t v) { return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
  *c = (CUcontext)1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  switch (a) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *v = SHARED + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *v = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
  default: *v = 1000000;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  if (paper_recording)
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (memcmp(image, "\177ELF", 4))
    return CUDA_ERROR_INVALID_VALUE;
  paper_loads++;
  *m = (CUmodule)calloc(1, sizeof(Function));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  strncpy(((Function *)m)->name, name, 127);
  ((Function *)m)->shared = 49152;
  *f = (CUfunction)m;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
     : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 255 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    ((Function *)f)->shared = v;
  return v > SHARED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
EXPORT CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
  if (!(p & paper_tag))
    return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)v = p;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  Function *fun = (Function *)f;
  if (c->gridDimY > 65535 || c->gridDimZ > 65535 || c->blockDimX > 1024 ||
      (int)c->sharedMemBytes > fun->shared)
    return CUDA_ERROR_INVALID_VALUE;
  Launch *l = &paper_launches[paper_count++ % MOST];
  *l = (Launch){fun->name, {c->gridDimX, c->gridDimY, c->gridDimZ}, c->blockDimX,
                c->sharedMemBytes, c->numAttrs, (uint64_t)c->hStream};
  return CUDA_SUCCESS;
}
