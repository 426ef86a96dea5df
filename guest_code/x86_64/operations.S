# SPDX-License-Identifier: GPL-2.0-only
#
# Does what a list in memory says, one operation after the other: each is an address of a routine below, and up to three
# arguments. The host makes the lists from the routines' symbols (lib/dirty_tracking/tracked_vm.py).

	.include "guest.inc"

	.set OPERATION_SIZE, 32		# routine, %rdi, %rsi, %rdx
	.set CR4_OSXSAVE, 1 << 18

# The vCPU's block: where its list begins. The list ends with do_sync.
	.globl guest_main
guest_main:
	mov %rdi, %r15
	mov (%r15), %rbx
next:
	mov (%rbx), %rax
	mov 8(%rbx), %rdi
	mov 16(%rbx), %rsi
	mov 24(%rbx), %rdx
	add $OPERATION_SIZE, %rbx
	call *%rax
	jmp next

# Hands over to the host, which may put another list in the same place.
	.globl do_sync
do_sync:
	ucall UCALL_SYNC
	mov (%r15), %rbx
	ret

# --- stores: address in %rdi, value in %rsi ---

	.macro operation name
	.globl do_\name
do_\name:
	.endm

	operation store_1
	mov %sil, (%rdi)
	ret
	operation store_2
	mov %si, (%rdi)
	ret
	operation store_4
	mov %esi, (%rdi)
	ret
	operation store_8
	mov %rsi, (%rdi)
	ret
	operation store_16		# whatever is in the register
	movups %xmm0, (%rdi)
	ret
	operation store_32		# after enable_xsave
	vmovups %ymm0, (%rdi)
	ret
	operation store_64		# after enable_xsave
	vmovups %zmm0, (%rdi)
	ret
	operation store_nontemporal
	movnti %rsi, (%rdi)
	sfence
	ret
	operation store_nontemporal_16
	movntdq %xmm0, (%rdi)
	sfence
	ret

# --- stores that other instructions make ---

	operation push
	mov %rsp, %rax
	lea 8(%rdi), %rsp
	push %rsi
	mov %rax, %rsp
	ret
	operation call
	mov %rsp, %rax
	lea 8(%rdi), %rsp
	call 1f
1:	mov %rax, %rsp
	ret
	operation rep_stosb		# %rdx bytes
	mov %rdx, %rcx
	mov %esi, %eax
	rep stosb
	ret
	operation rep_stosq		# %rdx words
	mov %rdx, %rcx
	mov %rsi, %rax
	rep stosq
	ret
	operation rep_stosq_down	# %rdx words, the last of them at %rdi
	mov %rdx, %rcx
	mov %rsi, %rax
	std
	rep stosq
	cld
	ret
	operation rep_movsq		# %rdx words from %rsi
	mov %rdx, %rcx
	rep movsq
	ret
	operation fxsave
	fxsave64 (%rdi)
	ret
	operation xsave			# after enable_xsave; the header and all components that are enabled
	mov $-1, %eax
	mov %eax, %edx
	xsave64 (%rdi)
	ret
	operation sgdt			# 10 bytes
	sgdt (%rdi)
	ret
	operation load_segment		# selector %rsi of the descriptor table that (%rdi) describes
	lgdt (%rdi)
	mov %esi, %fs
	ret
	operation interrupt		# its frame is pushed below %rdi
	mov %rsp, %rax
	mov %rdi, %rsp
	int $INTERRUPT_VECTOR
	mov %rax, %rsp
	ret

# --- read-modify-write ---

	operation add
	add %rsi, (%rdi)
	ret
	operation lock_add
	lock add %rsi, (%rdi)
	ret
	operation xchg
	xchg %rsi, (%rdi)
	ret
	operation bts
	lock bts %rsi, (%rdi)
	ret
	operation cmpxchg		# to %rsi, where %rdx is expected
	mov %rdx, %rax
	cmpxchg %rsi, (%rdi)
	ret
	operation lock_cmpxchg		# likewise
	mov %rdx, %rax
	lock cmpxchg %rsi, (%rdi)
	ret
	operation lock_cmpxchg16b	# likewise, with upper halves of zero
	mov %rbx, %r8
	mov %rdx, %rax
	xor %edx, %edx
	mov %rsi, %rbx
	xor %ecx, %ecx
	lock cmpxchg16b (%rdi)
	mov %r8, %rbx
	ret

# --- the same by KVM's emulator, where the module parameter force_emulation_prefix allows it ---

	.macro emulated instruction:vararg
	ud2
	.ascii "kvm"
	\instruction
	.endm

	operation emulated_store_1
	emulated mov %sil, (%rdi)
	ret
	operation emulated_store_2
	emulated mov %si, (%rdi)
	ret
	operation emulated_store_4
	emulated mov %esi, (%rdi)
	ret
	operation emulated_store_8
	emulated mov %rsi, (%rdi)
	ret
	operation emulated_store_16
	emulated movups %xmm0, (%rdi)
	ret
	operation emulated_push
	mov %rsp, %rax
	lea 8(%rdi), %rsp
	emulated push %rsi
	mov %rax, %rsp
	ret
	operation emulated_add
	emulated add %rsi, (%rdi)
	ret
	operation emulated_lock_add
	emulated lock add %rsi, (%rdi)
	ret
	operation emulated_xchg
	emulated xchg %rsi, (%rdi)
	ret
	operation emulated_cmpxchg	# to %rsi, where %rdx is expected
	mov %rdx, %rax
	emulated cmpxchg %rsi, (%rdi)
	ret
	operation emulated_lock_cmpxchg	# likewise
	mov %rdx, %rax
	emulated lock cmpxchg %rsi, (%rdi)
	ret
	operation emulated_load
	emulated mov (%rdi), %rax
	ret

# --- what does not write ---

	operation load
	mov (%rdi), %rax
	ret
	operation rep_lodsb		# %rdx bytes
	mov %rdi, %rsi
	mov %rdx, %rcx
	rep lodsb
	ret
	operation prefetch
	prefetcht0 (%rdi)
	prefetchw (%rdi)
	ret
	operation clflush
	clflush (%rdi)
	ret
	operation execute		# the host put a ret there
	call *%rdi
	ret
	operation test
	testq $1, (%rdi)
	ret
	operation store_nothing		# rep without repetitions
	xor %ecx, %ecx
	xor %eax, %eax
	rep stosb
	ret

# --- the CPU's own state ---

	operation wrmsr			# %rsi to register %rdi
	mov %edi, %ecx
	mov %esi, %eax
	mov %rsi, %rdx
	shr $32, %rdx
	wrmsr
	ret
	operation enable_xsave		# with the components %rsi
	mov %cr4, %rax
	or $CR4_OSXSAVE, %rax
	mov %rax, %cr4
	xor %ecx, %ecx
	mov %esi, %eax
	xor %edx, %edx
	xsetbv
	ret
	operation take_interrupts	# those that are pending
	sti
	nop
	cli
	ret
	operation interruptible_load	# with interrupts enabled
	sti
	nop
	mov (%rdi), %rax
	cli
	ret
	operation hypercall		# number %rdi, arguments %rsi and %rdx; the answer stays in %r12
	mov %rbx, %r8
	mov %edi, %eax
	mov %rsi, %rbx
	mov %rdx, %rcx
	vmmcall				# which KVM replaces where the CPU has vmcall
	mov %r8, %rbx
	mov %rax, %r12
	ret

# --- what the host does while the guest runs: it is told of %rsi at (%rdx), and waited for until it says as much behind that.
# Meanwhile a load of (%rdi), where the store goes then, keeps the translation in use. Without a pause, which makes the vCPU
# leave its guest where KVM intercepts it.

	operation meet_and_store
	mov %rsi, (%rdx)
1:	mov (%rdi), %rax
	cmp %rsi, 8(%rdx)
	jb 1b
	mov %rsi, (%rdi)
	ret

# --- a guest of this guest's own, which does operations as well: %rdi is its VMCB's physical address, %rsi its block ---

	operation vmrun
	push %rbx
	push %r15
	mov %rdi, %rax
	mov %rsi, %rdi
	clgi
	vmrun %rax
	stgi
	pop %r15
	pop %rbx
	ret
	operation vmsave		# to the physical address %rdi
	mov %rdi, %rax
	vmsave %rax
	ret
	operation vmload		# from there
	mov %rdi, %rax
	vmload %rax
	ret
	operation vmmcall		# the end of the inner guest's list
	vmmcall

# --- string input from port %rsi, %rdx bytes: the data is KVM's to write ---

	operation rep_insb
	mov %rdx, %rcx
	mov %esi, %edx
	rep insb
	ret
