/* A CUDA runtime without a GPU: its memory is the host's, and kernels do nothing.

   Preloaded, it stands in front of the one that PyTorch's CUDA build brings. What that build asks
   for is answered as an NVIDIA H200 would; any other function is still the real runtime's, which
   finds no GPU. Counts what each thread reads back from the device. STUB_GPUS says how many there
   are, else it is one. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef cudaGetDeviceProperties

static __thread int current = 0;
static long handles = 16; /* streams and events are numbers, and none is the default stream */
static __thread long reads = 0;

long stub_reads(void) { return reads; } /* of the calling thread */

#define NOTHING(name, ...) \
  cudaError_t name(__VA_ARGS__) { return cudaSuccess; }

static cudaError_t allocate(void **place, size_t size) {
  size = (size + 4095) / 4096 * 4096;
  *place = aligned_alloc(4096, size);
  if (*place == NULL && size) return cudaErrorMemoryAllocation;
  memset(*place, 0, size);
  return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDeviceToHost) ++reads;
  memcpy(to, from, size);
  return cudaSuccess;
}

static cudaError_t number(void *handle) {
  *(long *)handle = __atomic_add_fetch(&handles, 16, __ATOMIC_RELAXED);
  return cudaSuccess;
}

/* The device */
cudaError_t cudaGetDeviceCount(int *count) {
  const char *given = getenv("STUB_GPUS");
  *count = given ? atoi(given) : 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current = device; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (stub)");
  p->major = 9;
  p->multiProcessorCount = 132;
  p->totalGlobalMem = 140ULL << 30;
  p->warpSize = 32;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = 60 << 20;
  p->memoryBusWidth = 6144;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor  ? 9
           : attribute == cudaDevAttrMultiProcessorCount ? 132
                                                         : 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  snprintf(id, length, "0000:00:00.0");
  return cudaSuccess;
}

/* Memory */
cudaError_t cudaMalloc(void **place, size_t size) { return allocate(place, size); }
cudaError_t cudaMallocHost(void **place, size_t size) { return allocate(place, size); }
cudaError_t cudaHostAlloc(void **place, size_t size, unsigned f) { return allocate(place, size); }
cudaError_t cudaFree(void *place) { free(place); return cudaSuccess; }
cudaError_t cudaFreeHost(void *place) { free(place); return cudaSuccess; }
cudaError_t cudaMemset(void *to, int v, size_t n) { memset(to, v, n); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int v, size_t n, cudaStream_t s) { return cudaMemset(to, v, n); }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *available = *total = 140ULL << 30;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
  return copy(to, from, n, kind);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind,
                            cudaStream_t s) {
  return copy(to, from, n, kind);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *place) {
  memset(attributes, 0, sizeof *attributes); /* unregistered, as a host's */
  return cudaSuccess;
}

NOTHING(cudaHostRegister, void *place, size_t size, unsigned flags)
NOTHING(cudaHostUnregister, void *place)

/* Streams and events: everything is over as soon as it is asked for */
#undef cudaStreamGetCaptureInfo
cudaError_t cudaStreamCreate(cudaStream_t *s) { return number(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return number(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return number(s); }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return number(e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { return number(e); }

cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = 1;
  return cudaSuccess;
}

NOTHING(cudaStreamDestroy, cudaStream_t s)
NOTHING(cudaStreamQuery, cudaStream_t s)
NOTHING(cudaStreamSynchronize, cudaStream_t s)
NOTHING(cudaStreamWaitEvent, cudaStream_t s, cudaEvent_t e, unsigned flags)
NOTHING(cudaDeviceSynchronize, void)
NOTHING(cudaEventDestroy, cudaEvent_t e)
NOTHING(cudaEventQuery, cudaEvent_t e)
NOTHING(cudaEventRecord, cudaEvent_t e, cudaStream_t s)
NOTHING(cudaEventRecordWithFlags, cudaEvent_t e, cudaStream_t s, unsigned flags)
NOTHING(cudaEventSynchronize, cudaEvent_t e)
NOTHING(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)

/* Kernels */
NOTHING(cudaLaunchKernel, const void *k, dim3 grid, dim3 block, void **a, size_t n, cudaStream_t s)
NOTHING(cudaLaunchKernelExC, const cudaLaunchConfig_t *c, const void *kernel, void **arguments)
NOTHING(cudaFuncSetAttribute, const void *kernel, enum cudaFuncAttribute attribute, int value)
NOTHING(cudaGetLastError, void)
NOTHING(cudaPeekAtLastError, void)

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *kernel, int block,
                                                          size_t shared) {
  *count = 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel,
                                                                   int block, size_t shared,
                                                                   unsigned flags) {
  *count = 2;
  return cudaSuccess;
}
