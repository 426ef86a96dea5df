// SPDX-License-Identifier: GPL-2.0-only
/*
 * @TITLE@
 *
 * Exit status: 0 KVM reports what it has to, 1 it does not, 4 cannot be tested here.
 */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>

#define FAIL 1
#define SKIP 4
#define PAGE 4096UL
#define GUEST_SIZE (16 * PAGE)
#define STORES 0x1000UL
#define LOADS 0x1800UL
#define TABLES 0x2000UL
#define LISTS 0x8000UL
#define LIST(vcpu) (LISTS + (vcpu) * PAGE)
#define BASE 0x40600000UL
#define GPA(place, page) (BASE + ((place) * @MOST_PAGES@UL + (page)) * PAGE)
#define VCPUS @VCPUS@
#define SLOTS @SLOTS@
#define MOST_PAGES @MOST_PAGES@
#define HAS_RINGS @HAS_RINGS@
#define RING_ENTRIES @RING_ENTRIES@
#define MANUAL @MANUAL@

/* Runs of consecutive pages of a slot, each as { first page, number of pages } */
struct run {
	int first, count;
};

#define PAGES(...) ((const struct run[]){ __VA_ARGS__, { 0, 0 } })
#define for_each_page(page, runs) \
	for (const struct run *r = (runs); r->count; r++) \
		for (int page = r->first; page < r->first + r->count; page++)

struct slot {
	int place, npages, logged;
	unsigned long *mem;
};

/* Of a ring: the next entry to look for, to harvest, and how many were harvested since the last reset */
struct vcpu {
	int fd;
	struct kvm_run *run;
	struct kvm_dirty_gfn *ring;
	unsigned int seen, next, harvested;
};

static int vm;
static unsigned long *guest, writes;
static struct slot slots[SLOTS];
static struct vcpu vcpus[VCPUS];
/* How often the step that ran last had each page reported, and how often since a ring was full in it */
static int reported[SLOTS][MOST_PAGES], recently[SLOTS][MOST_PAGES];

static int call(int status, int fd, unsigned long request, unsigned long arg, const char *what)
{
	int ret = ioctl(fd, request, arg);

	if (ret < 0)
		err(status, "%s", what);
	return ret;
}

#define SETUP(fd, request, arg) call(SKIP, fd, request, (unsigned long)(arg), #request)
#define CALL(fd, request, arg) call(FAIL, fd, request, (unsigned long)(arg), #request)

static void *map(size_t size, int fd, off_t offset)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset);

	if (mem == MAP_FAILED)
		err(SKIP, "mmap");
	return mem;
}

static void set_region(int slot, int flags, unsigned long gpa, unsigned long size, void *mem)
{
	struct kvm_userspace_memory_region region = { slot, flags, gpa, size, (unsigned long)mem };

	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static void set_slot(int slot)
{
	struct slot *s = &slots[slot];

	set_region(slot, s->logged ? KVM_MEM_LOG_DIRTY_PAGES : 0, GPA(s->place, 0), s->npages * PAGE, s->mem);
}

/* A 64-bit guest with its own page tables: a large page for its code, small pages for the slots. */
static void create_tables(void)
{
	unsigned long *table = guest + TABLES / 8;

	table[0] = (TABLES + PAGE) | 7;
	table[512] = (TABLES + 2 * PAGE) | 7;
	table[513] = (TABLES + 3 * PAGE) | 7;
	table[2 * 512] = 0x87;
	table[3 * 512 + BASE / (512 * PAGE) % 512] = (TABLES + 4 * PAGE) | 7;
	table[3 * 512 + BASE / (512 * PAGE) % 512 + 1] = (TABLES + 5 * PAGE) | 7;
	for (unsigned long page = 0; page < 2 * 512; page++)
		table[4 * 512 + page] = (BASE + page * PAGE) | 7;
}

static void create_vcpu(int kvm, int number)
{
	struct kvm_segment flat = { .limit = -1, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + 256 * sizeof(cpuid->entries[0]));
	struct vcpu *vcpu = &vcpus[number];
	struct kvm_sregs sregs;

	vcpu->fd = SETUP(vm, KVM_CREATE_VCPU, number);
	vcpu->run = map(SETUP(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), vcpu->fd, 0);
	if (HAS_RINGS)
		vcpu->ring = map(RING_ENTRIES * sizeof(*vcpu->ring), vcpu->fd, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	cpuid->nent = 256;
	SETUP(kvm, KVM_GET_SUPPORTED_CPUID, cpuid);
	SETUP(vcpu->fd, KVM_SET_CPUID2, cpuid);
	free(cpuid);
	SETUP(vcpu->fd, KVM_GET_SREGS, &sregs);
	sregs.ds = sregs.es = sregs.ss = flat;
	flat.selector = 8;
	flat.type = 11;
	flat.db = 0;
	flat.l = 1;
	sregs.cs = flat;
	sregs.cr0 = 0x80010033;
	sregs.cr3 = TABLES;
	sregs.cr4 = 0x20;
	sregs.efer = 0x500;
	SETUP(vcpu->fd, KVM_SET_SREGS, &sregs);
}

void create_vm(int cap, unsigned long arg)
{
	/* 1: lodsq; mov %rbx, (%rax) or mov (%rax), %rdx; loop 1b; hlt */
	static const char stores[] = "\x48\xad\x48\x89\x18\xe2\xf9\xf4", loads[] = "\x48\xad\x48\x8b\x10\xe2\xf9\xf4";
	struct kvm_enable_cap enable = { .cap = cap, .args = { arg } };
	int kvm = open("/dev/kvm", O_RDWR);

	if (kvm < 0)
		err(SKIP, "/dev/kvm");
	vm = SETUP(kvm, KVM_CREATE_VM, 0);
	if (cap)
		SETUP(vm, KVM_ENABLE_CAP, &enable);
	SETUP(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
	guest = map(GUEST_SIZE, -1, 0);
	memcpy((char *)guest + STORES, stores, sizeof(stores));
	memcpy((char *)guest + LOADS, loads, sizeof(loads));
	create_tables();
	set_region(0, 0, 0, GUEST_SIZE, guest);
	for (int number = 0; number < VCPUS; number++)
		create_vcpu(kvm, number);
}

/* Count what KVM pushed to the rings since the last look. */
static void look_into_rings(void)
{
	for (struct vcpu *vcpu = vcpus; HAS_RINGS && vcpu < vcpus + VCPUS; vcpu++) {
		while (vcpu->seen - (vcpu->next - vcpu->harvested) < RING_ENTRIES) {
			struct kvm_dirty_gfn *entry = &vcpu->ring[vcpu->seen % RING_ENTRIES];

			if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
				break;
			if (entry->slot >= SLOTS || entry->offset >= MOST_PAGES)
				errx(FAIL, "an entry names slot %u, page %llu: there is none", entry->slot,
				     (unsigned long long)entry->offset);
			reported[entry->slot][entry->offset]++;
			recently[entry->slot][entry->offset]++;
			vcpu->seen++;
		}
	}
}

static void begin_step(void)
{
	look_into_rings();
	memset(reported, 0, sizeof(reported));
	memset(recently, 0, sizeof(recently));
	alarm(60); /* a step that does not end */
}

static void take_entries(int number, int most)
{
	struct vcpu *vcpu = &vcpus[number];

	look_into_rings();
	for (; most && vcpu->next != vcpu->seen; most--, vcpu->harvested++)
		vcpu->ring[vcpu->next++ % RING_ENTRIES].flags = KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET;
}

static void reset_rings(void)
{
	int harvested = 0, count = CALL(vm, KVM_RESET_DIRTY_RINGS, 0);

	for (struct vcpu *vcpu = vcpus; vcpu < vcpus + VCPUS; vcpu++) {
		harvested += vcpu->harvested;
		vcpu->harvested = 0;
	}
	if (count != harvested)
		errx(FAIL, "KVM_RESET_DIRTY_RINGS: %d entries were harvested, %d reset", harvested, count);
}

static void empty_rings(void)
{
	for (int number = 0; number < VCPUS; number++)
		take_entries(number, RING_ENTRIES);
	reset_rings();
}

static void run_guest(int number, int slot, unsigned long code, const struct run *runs)
{
	struct vcpu *vcpu = &vcpus[number];
	unsigned long *list = guest + LIST(number) / 8;
	struct kvm_regs regs = { .rip = code, .rsi = LIST(number), .rbx = ++writes, .rflags = 2 };

	begin_step();
	for_each_page(page, runs)
		list[regs.rcx++] = GPA(slots[slot].place, page);
	CALL(vcpu->fd, KVM_SET_REGS, &regs);
	for (;;) {
		CALL(vcpu->fd, KVM_RUN, 0);
		look_into_rings();
		if (vcpu->run->exit_reason != KVM_EXIT_DIRTY_RING_FULL)
			break;
		empty_rings();
		memset(recently, 0, sizeof(recently));
	}
	if (vcpu->run->exit_reason != KVM_EXIT_HLT)
		errx(SKIP, "KVM_RUN ends with exit %u", vcpu->run->exit_reason);
}

void write_pages(int vcpu, int slot, const struct run *runs)
{
	run_guest(vcpu, slot, STORES, runs);
	for_each_page(page, runs)
		if (slots[slot].mem[page * 512] != writes)
			errx(FAIL, "slot %d, page %d: the store did not reach its memory", slot, page);
}

void load_pages(int vcpu, int slot, const struct run *runs)
{
	run_guest(vcpu, slot, LOADS, runs);
}

void write_pages_from_host(int slot, const struct run *runs)
{
	begin_step();
	for_each_page(page, runs)
		slots[slot].mem[page * 512 + 1]++;
}

void create_slot(int slot, int place, int npages, int logged)
{
	unsigned long *mem = map(npages * PAGE, -1, 0);

	begin_step();
	madvise(mem, npages * PAGE, MADV_NOHUGEPAGE);
	memset(mem, 0, npages * PAGE);
	slots[slot] = (struct slot){ place, npages, logged, mem };
	set_slot(slot);
}

void delete_slot(int slot)
{
	begin_step();
	set_region(slot, 0, GPA(slots[slot].place, 0), 0, slots[slot].mem);
	munmap(slots[slot].mem, slots[slot].npages * PAGE);
	memset(&slots[slot], 0, sizeof(slots[slot]));
}

void move_slot(int slot, int place)
{
	begin_step();
	slots[slot].place = place;
	set_slot(slot);
}

void set_dirty_logging(int slot, int enable)
{
	begin_step();
	slots[slot].logged = enable;
	set_slot(slot);
}

static void get_bitmap(int slot, unsigned long *bitmap)
{
	struct kvm_dirty_log log = { .slot = slot, .dirty_bitmap = bitmap };

	CALL(vm, KVM_GET_DIRTY_LOG, &log);
	for (int page = 0; page < slots[slot].npages; page++)
		reported[slot][page] = recently[slot][page] = bitmap[page / 64] >> page % 64 & 1;
}

static void clear_bitmap(int slot, int first_page, int num_pages, unsigned long *mask)
{
	struct kvm_clear_dirty_log clear = {
		.slot = slot, .first_page = first_page, .num_pages = num_pages, .dirty_bitmap = mask,
	};

	CALL(vm, KVM_CLEAR_DIRTY_LOG, &clear);
}

void get_dirty_log(int slot)
{
	unsigned long bitmap[MOST_PAGES / 64 + 1] = { 0 };

	begin_step();
	get_bitmap(slot, bitmap);
}

void clear_dirty_log(int slot, int first_page, int num_pages, const struct run *runs)
{
	unsigned long mask[MOST_PAGES / 64 + 1] = { 0 };

	begin_step();
	for_each_page(page, runs)
		mask[(page - first_page) / 64] |= 1UL << (page - first_page) % 64;
	clear_bitmap(slot, first_page, num_pages, mask);
}

void harvest_ring(int vcpu, int most)
{
	begin_step();
	take_entries(vcpu, most);
}

void reset_dirty_rings(void)
{
	begin_step();
	reset_rings();
}

/* A round of live migration: collect all that is dirty, and have it write-protected again. */
void collect(void)
{
	begin_step();
	if (HAS_RINGS)
		empty_rings();
	for (int slot = 1; !HAS_RINGS && slot < SLOTS; slot++) {
		unsigned long bitmap[MOST_PAGES / 64 + 1] = { 0 };

		if (!slots[slot].logged)
			continue;
		get_bitmap(slot, bitmap);
		if (MANUAL)
			clear_bitmap(slot, 0, slots[slot].npages, bitmap);
	}
}

/* The step before had to have each of these pages reported. */
void must_report(int slot, const struct run *runs)
{
	look_into_rings();
	for_each_page(page, runs)
		if (!reported[slot][page])
			errx(FAIL, "lost: slot %d, page %d was written, and is not reported", slot, page);
}

/* The step before must not have any of these pages reported more than most times. */
void may_report(int most, int slot, const struct run *runs)
{
	look_into_rings();
	for_each_page(page, runs)
		if (recently[slot][page] > most)
			errx(FAIL, "spurious: slot %d, page %d is reported %d times, and %d at most are right", slot, page,
			     recently[slot][page], most);
}

int main(void)
{
@STEPS@
	printf("KVM reports what it has to\n");
	return 0;
}
