// The scheduler; never compiled with -fsanitize=thread, which is told of what matters by hand.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <vector>

#if !defined(__x86_64__)
#error "switching fibers is written for x86-64"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define ACQUIRE(x) __tsan_acquire(x)
#define RELEASE(x) __tsan_release(x)
#else
#define ACQUIRE(x)
#define RELEASE(x)
#endif

extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

namespace emu {
Ids ids;
uint64_t seed = 1;
int fault = 0;
int64_t most_blocks = 65535;
size_t dynamic_allowed = 0;
cudaError_t error = cudaSuccess;
int driver = CUDART_VERSION;

namespace {
constexpr int kMost = 1024;
constexpr size_t kStack = 256 << 10;

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake = nullptr;  // ASan's
  void* tsan = nullptr;
  int index = 0;
  bool done = true;
};

enum class Kind { none, threads, warp, shuffle };
struct Barrier {
  Kind kind = Kind::none;
  int detail = 0, arrived = 0;
  unsigned generation = 0, mask = 0;
  int waiting[kMost];
  char order[2];                // what TSan's clocks hang on, by parity of the generation
  uint64_t slots[2][32];
};

Fiber fibers[kMost], main_fiber;
Fiber* current = nullptr;
Barrier block_barrier, warp_barriers[kMost / 32];
int runnable[kMost], runnable_count = 0, threads = 0, finished = 0;
void (*body)(void*) = nullptr;
void* argument = nullptr;
bool trapped = false;
dim3 block_dim;
constexpr int kSlots = 33;  // the dynamic part and 32 declarations
void* memory[kSlots];
size_t memory_bytes[kSlots], dynamic_bytes = 0;
uint64_t shuffles = 0, reductions = 0;
char start_order, end_order;
constexpr size_t kPool = size_t(4) << 30;
char* pool = nullptr;
size_t pool_used = 0;

uint64_t random_number() {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return seed;
}

void set_ids(int index) {
  ids.thread = dim3(index % block_dim.x, index / block_dim.x % block_dim.y, index / (block_dim.x * block_dim.y));
}

void go_to(Fiber& to, bool ends) {
  Fiber* from = current;
  current = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake, to.stack, to.stack ? kStack : 0);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: this orders nothing
#endif
  (void)ends;
  emu_switch(&from->sp, to.sp);
  current = from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}

Fiber* by_index[kMost];

void yield(bool ends = false) {  // to a thread at random among those that can go on; to the caller where there is none
  Fiber* self = current;
  if (!runnable_count || trapped) {
    go_to(main_fiber, ends);
  } else {
    const int at = int(random_number() % uint64_t(runnable_count)), index = runnable[at];
    runnable[at] = runnable[--runnable_count];
    if (by_index[index] == self) return;
    go_to(*by_index[index], ends);
  }
  set_ids(self->index);
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!main_fiber.stack) main_fiber.stack = const_cast<char*>(static_cast<const char*>(bottom));
#endif
  Fiber* self = current;
  set_ids(self->index);
  ACQUIRE(&start_order);
  try {
    body(argument);
  } catch (int) {
    trapped = true;
  }
  RELEASE(&end_order);
  self->done = true;
  ++finished;
  yield(true);
  std::abort();
}

void prepare(Fiber& fiber, int index) {
  if (!fiber.stack) {
    fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#ifdef EMU_TSAN
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);  // frames of the block before, which nobody left
#endif
  fiber.index = index;
  fiber.done = false;
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;                            // keeps the stack at 16n + 8 on entry
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.sp = top;
}

// Lanes of one warp, or all threads. `orders`: whether memory is ordered.
unsigned wait_at(Barrier& barrier, Kind kind, unsigned mask, int detail, int expected, bool orders) {
  if (barrier.arrived == 0) {
    barrier.kind = kind, barrier.detail = detail, barrier.mask = mask;
  } else if (barrier.kind != kind || barrier.detail != detail || barrier.mask != mask) {
    fail("threads of one warp or block came to different collectives");
  }
  const unsigned generation = barrier.generation;
  if (orders) RELEASE(&barrier.order[generation % 2]);
  barrier.waiting[barrier.arrived++] = current->index;
  if (barrier.arrived == expected) {
    for (int i = 0; i < expected; ++i) runnable[runnable_count++] = barrier.waiting[i];
    barrier.arrived = 0;
    ++barrier.generation;
  }
  yield();  // the last one too, so that who goes on first is open
  if (orders) ACQUIRE(&barrier.order[generation % 2]);
  return generation;
}
}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "emulation: block (%u, %u), thread %u: %s\n", ids.block.x, ids.block.y, ids.thread.x, what);
  std::fflush(nullptr);
  std::abort();
}

void trap() { throw 1; }

void count_reduction() { ++reductions; }

void touch(const void* at) { (void)*static_cast<const volatile char*>(at); }

void sync_threads() { wait_at(block_barrier, Kind::threads, ~0u, 0, threads, true); }

void sync_warp(unsigned mask) {
  if (mask != ~0u) fail("partial masks are not emulated");
  wait_at(warp_barriers[current->index / 32], Kind::warp, mask, 0, 32, true);
}

void exchange(unsigned mask, uint64_t mine, int source, int detail, uint64_t& theirs) {
  if (mask != ~0u) fail("partial masks are not emulated");
  ++shuffles;
  Barrier& barrier = warp_barriers[current->index / 32];
  barrier.slots[barrier.generation % 2][current->index % 32] = mine;
  const unsigned generation = wait_at(barrier, Kind::shuffle, mask, detail, 32, false);
  theirs = barrier.slots[generation % 2][source];
}

void* shared(int which, size_t bytes, size_t alignment) {
  void*& place = memory[which + 1];
  if (which < 0) bytes = dynamic_bytes;
  if (!place) {
    memory_bytes[which + 1] = bytes;
#ifdef EMU_TSAN  // malloc counts as a write by the thread that calls it: take from a pool that main has made
    place = pool + pool_used;
    pool_used += (bytes + 63) / 64 * 64;
    if (pool_used > kPool) fail("pool");
#else
    if (posix_memalign(&place, alignment < 16 ? 16 : alignment, bytes ? bytes : 1)) std::abort();
#endif
    volatile unsigned char* poison = static_cast<volatile unsigned char*>(place);
    for (size_t i = 0; i < bytes; ++i) poison[i] = 0xff;  // NaN, -1
  }
  if (memory_bytes[which + 1] != bytes) fail("shared memory declared twice");
  return place;
}

bool run(dim3 grid, dim3 block, size_t dynamic, void (*body_)(void*), void* argument_) {
  threads = int(block.x * block.y * block.z);
  if (threads > kMost || threads % 32 || threads == 0) fail("number of threads");
  if (grid.x == 0 || grid.y == 0 || grid.x > 0x7fffffffu || grid.y > 65535) fail("grid");
  body = body_, argument = argument_, block_dim = block, dynamic_bytes = dynamic;
  ids.block_dim = block, ids.grid_dim = grid;
  trapped = false;
#ifdef EMU_TSAN
  if (!main_fiber.tsan) {
    main_fiber.tsan = __tsan_get_current_fiber();
    void* place = mmap(nullptr, kPool, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pool = static_cast<char*>(place);
  }
#endif
  std::vector<void*> used;
  const uint64_t blocks = uint64_t(grid.x) * grid.y, first = random_number() % blocks;
  for (uint64_t n = 0; n < blocks && !trapped; ++n) {
    const uint64_t number = (first + n) % blocks;
    ids.block = dim3(unsigned(number % grid.x), unsigned(number / grid.x));
    RELEASE(&start_order);
    const int shift = int(random_number() % threads);  // a fiber is another thread in another block
    for (int i = 0; i < threads; ++i) {
      by_index[i] = &fibers[(i + shift) % threads];
      prepare(*by_index[i], i);
      runnable[i] = i;
    }
    runnable_count = threads, finished = 0;
    block_barrier.arrived = 0;
    for (auto& barrier : warp_barriers) barrier.arrived = 0;
    current = &main_fiber;
    yield();
    if (!trapped && finished != threads) fail("some threads wait for others that have ended");
    size_t bytes = 0;
    for (int i = 0; i < kSlots; ++i) {
      if (!memory[i]) continue;
      bytes += memory_bytes[i];
      used.push_back(memory[i]);  // freed at the end: nothing else orders a block's accesses and the next one's
      memory[i] = nullptr;
    }
    if (bytes - dynamic > kStaticShared) fail("a kernel's own shared memory is more than cudaFuncGetAttributes says");
    if (bytes > 48 << 10 && (dynamic > dynamic_allowed || bytes > kShared)) fail("more shared memory than was allowed");
  }
  dynamic_allowed = 0;
  ACQUIRE(&end_order);
#ifdef EMU_TSAN
  pool_used = 0;
#else
  for (void* place : used) std::free(place);
#endif
  return !trapped;
}
}  // namespace emu

// For the tests: what drivers there are, and what the kernels did since the last question.
extern "C" __attribute__((visibility("default"))) void emu_set_driver(int version) { emu::driver = version; }
extern "C" __attribute__((visibility("default"))) void emu_counts(uint64_t* to) {
  to[0] = emu::shuffles, to[1] = emu::reductions;
  emu::shuffles = emu::reductions = 0;
}
// torch's, on a torch that has no CUDA.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
