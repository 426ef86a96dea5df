// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM_RESET_DIRTY_RINGS that a signal ends has reset entries whose pages it has not
 * write-protected: their next writes are in no ring.
 *
 * Exit status: 0 all writes are reported, 1 a write is lost, 4 cannot be tested here.
 */
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <linux/kvm.h>

#define FAIL 1
#define SKIP 4
#define PAGE 4096UL
#define CODE 0x1000UL
#define BASE 0x40000000UL
#define SLOT 1
#define NPAGES 3500
#define ENTRIES 4096

static int vm, vcpu;
static struct kvm_run *run;
static struct kvm_dirty_gfn *ring;

static int call(int fd, unsigned long request, unsigned long arg, const char *what)
{
	int ret = ioctl(fd, request, arg);

	if (ret < 0)
		err(SKIP, "cannot be tested here: %s", what);
	return ret;
}

#define CALL(fd, request, arg) call(fd, request, (unsigned long)(arg), #request)

static void *map(size_t size, int fd, off_t offset)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset);

	if (mem == MAP_FAILED)
		err(SKIP, "cannot be tested here: mmap");
	return mem;
}

static void set_slot(int slot, int flags, unsigned long gpa, unsigned long npages, void *mem)
{
	struct kvm_userspace_memory_region region = {
		slot, flags, gpa, npages * PAGE, (unsigned long)mem,
	};

	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

/* A VM with a capability, and a vCPU whose code stores to ecx pages from address eax on. */
static void create_vm(int cap, unsigned long arg, const char *name)
{
	/* 1: movb $1, (%eax); add $0x1000, %eax; loop 1b; hlt */
	static const char code[] = "\xc6\x00\x01\x05\x00\x10\x00\x00\xe2\xf6\xf4";
	struct kvm_segment flat = {
		.limit = -1, .selector = 8, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1,
	};
	struct kvm_enable_cap enable = { .cap = cap, .args = { arg } };
	int kvm = open("/dev/kvm", O_RDWR);
	struct kvm_sregs sregs;

	if (kvm < 0)
		err(SKIP, "cannot be tested here: /dev/kvm");
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	call(vm, KVM_ENABLE_CAP, (unsigned long)&enable, name);
	set_slot(0, 0, CODE, 1, memcpy(map(PAGE, -1, 0), code, sizeof(code)));
	CALL(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = map(CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), vcpu, 0);
	CALL(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cr0 |= 1; /* protected mode, without paging */
	sregs.ds = flat;
	flat.type = 11;
	sregs.cs = flat;
	CALL(vcpu, KVM_SET_SREGS, &sregs);
}

static void guest_write(unsigned long gpa, unsigned long npages)
{
	struct kvm_regs regs = { .rip = CODE, .rax = gpa, .rcx = npages, .rflags = 2 };

	CALL(vcpu, KVM_SET_REGS, &regs);
	CALL(vcpu, KVM_RUN, 0);
	if (run->exit_reason != KVM_EXIT_HLT)
		errx(SKIP, "cannot be tested here: KVM_RUN ends with exit %u", run->exit_reason);
}

/* Hand all entries back to KVM; seen[] gets 1 for the pages that they name. */
static void harvest(char *seen)
{
	struct kvm_dirty_gfn *entry;
	static unsigned int next;

	memset(seen, 0, NPAGES);
	while (ring[next % ENTRIES].flags == KVM_DIRTY_GFN_F_DIRTY) {
		entry = &ring[next++ % ENTRIES];
		if (entry->slot == SLOT && entry->offset < NPAGES)
			seen[entry->offset] = 1;
		entry->flags = KVM_DIRTY_GFN_F_RESET;
	}
}

static void ignore(int signal) { (void)signal; }

int main(void)
{
	struct itimerval timer = { 0 }, none = { 0 };
	void *mem = map(NPAGES * PAGE, -1, 0);
	int count, try, ended = 0;
	char seen[NPAGES], *lost;
	long delay = 1;

	create_vm(KVM_CAP_DIRTY_LOG_RING, ENTRIES * sizeof(*ring), "KVM_CAP_DIRTY_LOG_RING");
	ring = map(ENTRIES * sizeof(*ring), vcpu, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	set_slot(SLOT, KVM_MEM_LOG_DIRTY_PAGES, BASE, NPAGES, mem);
	signal(SIGALRM, ignore);
	for (try = 0; try < 100; try++) {
		guest_write(BASE, NPAGES);
		harvest(seen);
		lost = memchr(seen, 0, NPAGES);
		if (lost)
			errx(FAIL, "lost: page %td was written, and is in no ring", lost - seen);
		timer.it_value.tv_usec = delay;
		setitimer(ITIMER_REAL, &timer, NULL);
		count = CALL(vm, KVM_RESET_DIRTY_RINGS, 0);
		setitimer(ITIMER_REAL, &none, NULL);
		/* The next signal comes later if this one ended the call, and earlier if not. */
		ended += count < NPAGES;
		delay += count < NPAGES ? delay / 8 + 1 : -delay / 8;
		while (count < NPAGES)
			count += CALL(vm, KVM_RESET_DIRTY_RINGS, 0);
	}
	if (!ended)
		errx(SKIP, "cannot be tested here: no signal ended the call");
	printf("all writes are reported after %d resets that a signal ended\n", ended);
	return 0;
}
