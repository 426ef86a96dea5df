# SPDX-License-Identifier: GPL-2.0-only
#
# Touches a range of test memory, and then loads from and stores to pages in the order of a table that the host provides, once
# for each time that the host resumes the vCPU.

	.include "guest.inc"

# The vCPU's block (%rdi)
	.globl BLOCK_FILL_START, BLOCK_FILL_END, BLOCK_TABLE, BLOCK_TABLE_END, BLOCK_SIZE
	.set BLOCK_FILL_START, 0	# start of the range to touch
	.set BLOCK_FILL_END, 8		# its end, whole pages
	.set BLOCK_TABLE, 16		# the table: a gva per access; with bit 0 set, a load from there
	.set BLOCK_TABLE_END, 24	# its end
	.set BLOCK_SIZE, 64

	.set PAGE_SIZE, 4096

	.globl guest_main
guest_main:
	mov BLOCK_FILL_START(%rdi), %rbx
	mov BLOCK_FILL_END(%rdi), %rcx
fill:
	mov %rcx, (%rbx)
	add $PAGE_SIZE, %rbx
	cmp %rcx, %rbx
	jb fill
	ucall UCALL_SYNC
again:
	mov BLOCK_TABLE(%rdi), %rsi
	mov BLOCK_TABLE_END(%rdi), %rcx
next:
	mov (%rsi), %rax
	add $8, %rsi
	test $1, %al
	jnz load
	mov %rsi, (%rax)
	cmp %rcx, %rsi
	jb next
	jmp end
load:
	mov -1(%rax), %rdx
	cmp %rcx, %rsi
	jb next
end:
	ucall UCALL_SYNC
	jmp again
